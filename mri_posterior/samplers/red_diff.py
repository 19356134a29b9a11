"""RED-diff: variational inference with a point mass (Mardani, Song, Kautz, Vahdat, ICLR 2024, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Complex, Float

from mri_posterior.noise import NoiseStreams
from mri_posterior.posterior import Posterior
from mri_posterior.samplers.guided_diffusion import GuidedDiffusion, SmoothedPrior
from mri_posterior.samplers.step import State, Step, refuse_terms, require_positive

Image = Complex[torch.Tensor, "n H W"]


@dataclass(frozen=True)
class AdamState(State):
    """`first`, `second`: running moments of the gradient, real and imaginary part apart."""

    first: Float[torch.Tensor, "n H W 2"] | None = None
    second: Float[torch.Tensor, "n H W 2"] | None = None


@dataclass(frozen=True)
class REDdiff(GuidedDiffusion):
    """One good image by optimisation: the mean of a Gaussian of no width, regularised by denoising.

    Adam follows ``A^H (A m - y) + lambda (m - D(m + sigma n))`` while sigma falls, which is the paper's
    ``lambda_t (eps_theta - eps)`` with ``lambda_t = lambda sigma``. Not a sampler: results differ only by what noise
    the optimiser has left in.

    Attributes
    ----------
    prior_weight: lambda; it does not know the noise level of the data.
    learning_rate: Adam's, moments 0.9 and 0.99; images have magnitudes near 1.
    sigma_min, sigma_max, steps: see `GuidedDiffusion`.

    Evaluations: `steps`.
    """

    name: Literal["red_diff"] = "red_diff"
    steps: int = 1000
    prior_weight: float = 0.233
    learning_rate: float = 0.04

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "prior_weight", "learning_rate")

    def start(self, posterior: Posterior, streams: NoiseStreams, warm_start: Image | None) -> AdamState:
        refuse_terms(self, posterior)
        x = posterior.operator.adjoint(posterior.kspace).repeat(len(streams), 1, 1)
        zeros = torch.zeros_like(torch.view_as_real(x))
        return AdamState(posterior, x, first=zeros, second=zeros)

    def step(self, streams: NoiseStreams, state: AdamState, step: Step) -> AdamState:
        posterior, operator, mean = state.posterior, state.posterior.operator, state.x
        noised = mean + step.sigma * streams.complex(*operator.shape)
        denoised = SmoothedPrior(posterior.prior, self.sigma_min)(noised, step.sigma)
        pull = operator.adjoint(operator.residual(mean, posterior.kspace))
        gradient = torch.view_as_real(self.prior_weight * (mean - denoised) - pull)
        first = 0.9 * state.first + 0.1 * gradient
        second = 0.99 * state.second + 0.01 * gradient.square()
        unbiased = first / (1 - 0.9 ** (step.level + 1)), second / (1 - 0.99 ** (step.level + 1))
        move = torch.view_as_complex(unbiased[0] / (unbiased[1].sqrt() + 1e-8))
        return replace(state, x=mean - self.learning_rate * move, first=first, second=second)
