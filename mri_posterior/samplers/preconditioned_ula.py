"""Preconditioned unadjusted Langevin, the ``sample`` tool of BART (Blumenthal, Holliber, Tamir, Uecker 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Complex

from mri_posterior.errors import UserError
from mri_posterior.noise import NoiseStreams
from mri_posterior.posterior import Posterior
from mri_posterior.samplers.guided_diffusion import data_draw
from mri_posterior.samplers.preconditioner import SolvedPreconditioner
from mri_posterior.samplers.schedules import diffusion_levels
from mri_posterior.samplers.step import State, Step, refuse_terms, require_at_least, require_positive

Image = Complex[torch.Tensor, "n H W"]


@dataclass(frozen=True)
class PreconditionedULA:
    """Langevin steps on the exact likelihood times the prior of every noise level, with few evaluations.

    ``x' = x + gamma M g(x) + sqrt(2 gamma) r``, ``r ~ N(0, M)``, ``M = (A^H A / eta^2 + 1/sigma^2)^-1``, started from a
    draw of ``exp(-|y - A x|^2 / 2 eta^2 - |x|^2 / 2 sigma_max^2)``. Euler's stationary variance is ``2/(2 - gamma l)``
    times too large in a direction whose curvature is `l` times that of ``M^-1``: 1.33 where l = 1, which is where the
    data say much more than ``1/sigma_min^2`` or the prior holds nothing but noise of that level. Elsewhere l is smaller
    and so is the excess.

    Attributes
    ----------
    sigma_min: smoothing of the prior in the target, per real channel.
    sigma_max, levels: geometric prior levels.
    steps_per_level: Langevin steps at each; the paper takes 1 to 4.
    gamma: step size in units of the preconditioner.
    cg_tolerance, cg_iterations: of the preconditioner's solves. The paper takes 10, started from the last solution.

    Evaluations: ``levels * steps_per_level``.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["preconditioned_ula"] = "preconditioned_ula"
    sigma_min: float = 0.02
    sigma_max: float = 10.0
    levels: int = 100
    steps_per_level: int = 2
    gamma: float = 0.5
    cg_tolerance: float = 1e-4
    cg_iterations: int = 40

    def __post_init__(self) -> None:
        require_positive(self, "sigma_min")
        require_at_least(self, self.sigma_min, "sigma_max")
        require_at_least(self, 1, "levels", "steps_per_level", "cg_iterations")
        if not 0 < self.gamma < 2:
            raise UserError(f"sampler.gamma {self.gamma}: it must lie between 0 and 2, where the steps are stable")

    def plan(self, posterior: Posterior) -> list[Step]:
        sigmas = diffusion_levels(self.sigma_max, self.sigma_min, max(self.levels - 1, 1))[-self.levels :]
        levels = [Step("langevin", i, sigma, eta=posterior.noise_std) for i, sigma in enumerate(sigmas)]
        return [step for step in levels for _ in range(self.steps_per_level)]

    def start(self, posterior: Posterior, streams: NoiseStreams, warm_start: Image | None) -> State:
        refuse_terms(self, posterior)
        zeros = torch.zeros(len(streams), *posterior.operator.shape, dtype=streams.dtype, device=streams.device)
        return State(posterior, data_draw(streams, posterior, zeros, self.sigma_max, 1e-6, 100))

    def step(self, streams: NoiseStreams, state: State, step: Step) -> State:
        posterior, operator = state.posterior, state.posterior.operator
        curvature = torch.full_like(state.x.real[:1], step.sigma**-2)
        preconditioner = SolvedPreconditioner(
            operator, step.eta, curvature, operator.circulant(), self.cg_tolerance, self.cg_iterations
        )
        drift = posterior.score(state.x, step.sigma, operator.adjoint(posterior.kspace), step.eta)
        kick = math.sqrt(2 * self.gamma) * preconditioner.noise(streams)
        return replace(state, x=state.x + preconditioner.apply(self.gamma * drift + kick))
