"""Independent pixels: an image in which every pixel is a chain of its own, with a measurement of its own.

With ``A = I`` and a prior of independent pixels nothing in the plain kernel couples them, so that one run of the
package's sampler on one image is hundreds of thousands of chains, and averages over pixels are averages over y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Complex, Float

from mri_posterior.exact import white
from mri_posterior.image_operators import PixelMask
from mri_posterior.posterior import Posterior
from mri_posterior.priors import Prior
from mri_posterior.samplers import AnnealedLangevin


def normal_prior(x: Complex[torch.Tensor, "n H W"], sigma: float) -> Complex[torch.Tensor, "n H W"]:
    """All of the spread is smoothing: ``p_1 = N(0, 1)`` per real channel at sigma = 1, and ``E[x_0 | x] = 0``.

    The reverse diffusion is exact for it at any number of steps, so chains start as exact draws of p.
    """
    return torch.zeros_like(x)


def normal_pixels(shape: tuple[int, int], eta: float, seed: int, prior: Prior = normal_prior) -> Posterior:
    """Draws of N(0, 1), each seen once with noise `eta`; single precision."""
    generator = torch.Generator().manual_seed(seed)
    truth, noise = (white(generator, *shape, dtype=torch.complex64) for _ in range(2))
    operator = PixelMask(torch.ones(shape, dtype=torch.bool))
    return Posterior(prior, operator, truth + eta * noise, eta)


def plain_langevin(eta_start: float, levels: int, steps_per_level: int, h: float) -> AnnealedLangevin:
    """Algorithm 1 with the paper's Euler kernel on `normal_pixels`: time per step is `h` relaxation times ``1/a``,
    ``a = 1 + 1/eta_i^2``. One level is Langevin dynamics without annealing.
    """
    return AnnealedLangevin(
        algorithm=1,
        sigma_min=1.0,
        sigma_max=eta_start,
        diffusion_steps=1,
        levels=levels,
        steps_per_level=steps_per_level,
        final_steps=0,
        kernel="ula",
        precondition="none",
        h=h,
    )


@dataclass
class Watched:
    """A prior that notes a statistic of every state at which its score is asked for."""

    prior: Prior
    statistic: Callable[[torch.Tensor], object]
    sigma: float
    seen: list = field(default_factory=list)

    def __call__(self, x: Complex[torch.Tensor, "n H W"], sigma: float) -> Complex[torch.Tensor, "n H W"]:
        if sigma == self.sigma:
            self.seen.append(self.statistic(x))
        return self.prior(x, sigma)


def variance(x: torch.Tensor) -> float:
    """Per real channel, around 0."""
    return float(x.abs().square().double().mean()) / 2


def euler_variances(etas: list[float], steps_per_level: int, h: float) -> Float[torch.Tensor, " steps+1"]:
    """Exactly what the Euler kernel of `plain_langevin` does to the y-averaged variance, from p on, step by step.

    Within a level ``x' = (1 - h) x + h y/(1 + eta^2) + sqrt(2h/a) z``: a recursion of ``Var x`` and ``Cov(x, y_i)``.
    Between levels x knows the quieter ``y_(i+1)`` only through ``y_i = y_(i+1) + noise``.
    """
    spread, covariance = 1.0, 0.0
    result = [spread]
    for level, eta in enumerate(etas):
        total = 1 + eta**2
        for _ in range(steps_per_level):
            spread = (1 - h) ** 2 * spread + (2 * (1 - h) * h * covariance + h**2 + 2 * h * eta**2) / total
            covariance = (1 - h) * covariance + h
            result.append(spread)
        if level + 1 < len(etas):
            covariance *= (1 + etas[level + 1] ** 2) / total
    return torch.tensor(result, dtype=torch.float64)


def continuous_variance(eta: float, at: Float[torch.Tensor, "*t"]) -> Float[torch.Tensor, "*t"]:
    """The paper's Figure 3 without annealing: ``1 - 2/(1 + eta^2) e^-at (1 - e^-at)``, ``a = (1 + eta^2)/eta^2``."""
    return 1 - 2 / (1 + eta**2) * torch.exp(-at) * (1 - torch.exp(-at))


def worst_dip(ratio: float) -> float:
    """Largest loss of variance in a level with ``eta_i^2/eta_(i+1)^2 = ratio``, over all Gaussian modes.

    A mode of unit variance loses ``2 e (1 - e) (v' - v)`` at ``e = e^-at``, with v = 1/(1 + eta_i^2): at e = 1/2, and
    for ``eta_i eta_(i+1) = 1``, this is the number below.
    """
    root = math.sqrt(ratio)
    return (root - 1) / (root + 1) / 2


def largest_dip(etas: list[float]) -> float:
    """Largest loss of variance in any level of a schedule, for a mode of variance 1 that relaxed in the one before."""
    known = [1 / (1 + eta**2) for eta in etas]
    return max(b - a for a, b in pairwise(known)) / 2


def precision_ratios(etas: list[float]) -> list[float]:
    """``eta_i^2/eta_(i+1)^2`` between successive levels."""
    return [(a / b) ** 2 for a, b in pairwise(etas)]
