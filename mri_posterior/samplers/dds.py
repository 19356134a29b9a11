"""Decomposed diffusion sampler (Chung, Lee, Ye, ICLR 2024, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mri_posterior.errors import UserError
from mri_posterior.noise import NoiseStreams
from mri_posterior.samplers.guided_diffusion import GuidedDiffusion, SmoothedPrior, ancestral_share, renoise
from mri_posterior.samplers.step import State, Step, require_at_least, require_positive
from mri_posterior.solvers import conjugate_gradient


@dataclass(frozen=True)
class DDS(GuidedDiffusion):
    """Few evaluations: a DDIM whose denoised image takes a few conjugate-gradient steps towards the data.

    The steps go from ``D(x)`` towards the solution of ``(I + gamma A^H A) x = D(x) + gamma A^H y``, stopped early, with
    one `gamma` for all noise levels of image and data: the spread of the results is not calibrated.

    Attributes
    ----------
    data_weight: ``gamma``, for ``|A| <= 1``.
    cg_steps: conjugate-gradient steps.
    stochasticity: DDIM's ``eta``: 0 is deterministic but for the first noise, 1 is DDPM.
    sigma_min, sigma_max, steps: see `GuidedDiffusion`.

    Evaluations: `steps`.
    """

    name: Literal["dds"] = "dds"
    steps: int = 99
    data_weight: float = 5.0
    cg_steps: int = 5
    stochasticity: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "data_weight")
        require_at_least(self, 1, "cg_steps")
        if not 0 <= self.stochasticity <= 1:
            raise UserError(f"sampler.stochasticity {self.stochasticity}: it must lie between 0 and 1")

    def step(self, streams: NoiseStreams, state: State, step: Step) -> State:
        posterior, operator = state.posterior, state.posterior.operator
        denoised = SmoothedPrior(posterior.prior, self.sigma_min)(state.x, step.sigma)
        pull = self.data_weight * operator.adjoint(operator.residual(denoised, posterior.kspace))
        clean = denoised + conjugate_gradient(
            lambda x: x + self.data_weight * operator.normal(x), pull, tolerance=0.0, max_iterations=self.cg_steps
        )
        noise = (state.x - denoised) / step.sigma
        share = self.stochasticity**2 * ancestral_share(step)
        return replace(state, x=renoise(streams, clean, noise, step.next_sigma, share))
