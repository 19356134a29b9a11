"""Posterior sampling by a diffusion prior and annealed Langevin dynamics (Xun, Gupta, Price, NeurIPS 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Complex

from mri_posterior.noise import NoiseStreams
from mri_posterior.posterior import GaussianTerm, Posterior
from mri_posterior.samplers.langevin import LangevinKernel, LangevinState
from mri_posterior.samplers.reverse_diffusion import diffusion_step, diffusion_steps
from mri_posterior.samplers.schedules import annealing_levels, diffusion_levels
from mri_posterior.samplers.step import Step, require_at_least, require_positive
from mri_posterior.solvers import conjugate_gradient

Image = Complex[torch.Tensor, "n H W"]


@dataclass(frozen=True)
class AnnealedLangevinState(LangevinState):
    """`back_projections`: ``A^H y_i`` of every level, ``[levels, n, H, W]``: all that a level needs of ``y_i``."""

    back_projections: Complex[torch.Tensor, "levels n H W"] | None = None


@dataclass(frozen=True)
class AnnealedLangevin(LangevinKernel):
    """The paper's Algorithms 1, 2 and 3, with its plain Langevin kernel or with faster ones of the same target.

    Attributes
    ----------
    algorithm: 1 starts from a sample of the prior. 2 starts from the posterior's one Gaussian term ``x~``, by
        reverse diffusion from level ``std`` of that term. 3 makes ``x~ = x_0 + sigma_ws n`` itself from a warm start
        ``x_0`` (CG-SENSE unless one is given), then goes on as 2.
    guided: Algorithm 3 only (ours). The way down from `sigma_ws` follows ``p_sigma(x) * likelihood`` by Langevin
        steps at every diffusion level, so that chains arrive where the data want them, and ``x~`` is a starting
        point and nothing more. Without it (the paper) the way down samples ``p(x | x~)``, and ``x~`` stays in the
        target as a Gaussian term, which pulls the result towards ``x_0`` by the share ``V / (V + sigma_ws^2)``,
        V the posterior variance.
    sigma_min: smoothing of the prior in the target, per real channel.
    sigma_ws: noise put on the warm start: large against its error, small against the image.
    sigma_max: where Algorithm 1's reverse diffusion starts.
    diffusion_steps, guided_steps: levels of the way down, and Langevin steps at each when it is guided.
    eta_share: the guided way down anneals the measurement noise along with the prior's: ``eta_i^2 = eta^2 + (eta_share
        sigma_i)^2``, which is how well an image still noised by ``sigma_i`` can be asked to fit. With 0 the chain is
        pinned to the data while it is still coarse, and directions that mix slowly come out too narrow.
    levels, steps_per_level, final_steps: annealing levels after the way down, Langevin steps at each, and extra steps
        at the last. Unguided, annealing starts where the likelihood is as weak as what the chain already knows.
    coupled_noise: anneal on noised measurements ``y_i`` of one coupled path (the paper) rather than on ``y`` itself.
    precondition: as in `LangevinKernel`, but the way down is always at the prior's worst case: a spectrum averaged
        over the image is too bold for its flat parts while sigma is large.
    kernel, h, spectrum_probes, stability_probes, cg_tolerance, cg_iterations: see `LangevinKernel`.
    """

    name: Literal["annealed_langevin"] = "annealed_langevin"
    algorithm: Literal[1, 2, 3] = 3
    guided: bool = True
    sigma_min: float = 0.02
    sigma_ws: float = 0.4
    sigma_max: float = 10.0
    diffusion_steps: int = 10
    guided_steps: int = 2
    eta_share: float = 1.0
    levels: int = 2
    steps_per_level: int = 1
    final_steps: int = 20
    coupled_noise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "sigma_min", "sigma_ws", "sigma_max")
        require_at_least(self, 1, "diffusion_steps", "guided_steps", "levels", "steps_per_level")
        require_at_least(self, 0, "final_steps")

    def plan(self, posterior: Posterior) -> list[Step]:
        """The way down to `sigma_min`, then every level's Langevin steps."""
        eta, start = posterior.noise_std, self._start_level(posterior)
        if self._is_guided:
            sigmas = diffusion_levels(start, self.sigma_min, self.diffusion_steps)
            etas = [math.hypot(eta, self.eta_share * sigma) for sigma in sigmas]
            guided = zip(sigmas[:-1], etas[:-1], strict=True)
            steps = [Step("guided", 0, s, eta=e) for s, e in guided for _ in range(self.guided_steps)]
            first = etas[-1]
        else:
            first = max(start, eta)
            steps = diffusion_steps(start, self.sigma_min, self.diffusion_steps)
        levels = annealing_levels(first, eta, self.levels)
        for level, eta_level in enumerate(levels):
            count = self.steps_per_level + (self.final_steps if level == len(levels) - 1 else 0)
            steps += [Step("langevin", level, self.sigma_min, eta=eta_level)] * count
        noises = _noise_levels(steps)
        return [replace(s, level=s.level if s.eta is None else noises.index(s.eta)) for s in steps]

    def start(self, posterior: Posterior, streams: NoiseStreams, warm_start: Image | None) -> AnnealedLangevinState:
        shape = posterior.operator.shape
        if self.algorithm == 1:
            x = self.sigma_max * streams.complex(*shape)
        elif self.algorithm == 2:
            if len(posterior.terms) != 1:
                raise ValueError("Algorithm 2 needs a posterior with exactly one Gaussian term, the noised observation")
            x = posterior.terms[0].mean.expand(len(streams), *shape)
        else:
            x_0 = cg_sense(posterior) if warm_start is None else warm_start
            x = x_0 + self.sigma_ws * streams.complex(*shape)
            if not self.guided:
                posterior = posterior.with_term(GaussianTerm(x, self.sigma_ws))
        return AnnealedLangevinState(posterior, x, back_projections=self._measurement_path(posterior, streams))

    def step(self, streams: NoiseStreams, state: AnnealedLangevinState, step: Step) -> AnnealedLangevinState:
        if step.phase == "diffusion":
            return diffusion_step(state.posterior.prior, streams, state, step)
        if step != state.entered:
            state = self.enter(streams, state, step, learn=step.phase == "langevin")
        drift = state.posterior.score(state.x, step.sigma, state.back_projections[step.level], step.eta)
        return self.move(streams, state, drift)

    @property
    def _is_guided(self) -> bool:
        return self.guided and self.algorithm == 3

    def _start_level(self, posterior: Posterior) -> float:
        if self.algorithm == 2 and posterior.terms:
            return posterior.terms[0].std
        return self.sigma_max if self.algorithm == 1 else self.sigma_ws

    def _measurement_path(self, posterior: Posterior, streams: NoiseStreams) -> Complex[torch.Tensor, "levels n H W"]:
        """``A^H y_i`` along one coupled path per chain.

        ``y_N = y`` and backwards ``y_i = y_(i+1) + sqrt(eta_i^2 - eta_(i+1)^2) n``, n white.
        """
        operator = posterior.operator
        etas = _noise_levels(self.plan(posterior))[::-1]
        path = [operator.adjoint(posterior.kspace).expand(len(streams), *operator.shape)]
        for quieter, louder in pairwise(etas):
            noise = 0.0
            if self.coupled_noise:
                noise = math.sqrt(louder**2 - quieter**2) * operator.adjoint(streams.complex(*operator.data_shape))
            path.append(path[-1] + noise)
        return torch.stack(path[::-1])


def _noise_levels(steps: list[Step]) -> list[float]:
    """The measurement noises of a plan, loudest first: one coupled noised measurement each."""
    return sorted({step.eta for step in steps if step.eta is not None}, reverse=True)


def cg_sense(posterior: Posterior, regularisation: float = 1e-2, iterations: int = 30) -> Image:
    """CG-SENSE, ``(A^H A + l I)^-1 A^H y`` (Pruessmann et al. 2001): the cheapest warm start, ``[1, H, W]``."""
    operator = posterior.operator
    return conjugate_gradient(
        lambda x: operator.normal(x) + regularisation * x,
        operator.adjoint(posterior.kspace)[None],
        tolerance=1e-5,
        max_iterations=iterations,
    )
