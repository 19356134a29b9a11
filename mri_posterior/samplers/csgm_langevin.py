"""Annealed Langevin dynamics with the measurement held fixed (Jalal, Arvinte, Daras et al., NeurIPS 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Complex

from mri_posterior.noise import NoiseStreams
from mri_posterior.posterior import Posterior
from mri_posterior.samplers.schedules import diffusion_levels
from mri_posterior.samplers.step import State, Step, refuse_terms, require_at_least, require_positive

Image = Complex[torch.Tensor, "n H W"]


@dataclass(frozen=True)
class CSGMLangevin:
    """The first score-based posterior sampler of MRI: plain Langevin steps while the prior's noise level falls.

    ``x += a (s(x, sigma) + A^H (y - A x) / (gamma^2 + eta^2)) + sqrt(2a) n`` with ``a = h sigma^2`` and gamma = sigma.
    As steps become small and many it samples ``p_sigma_min`` times the likelihood of noise level
    ``sqrt(eta^2 + sigma_min^2)``, larger than that of the data.

    Deviations: the paper's steps, 5e-5 at its last level 0.0066, are ``h = 1.15``, which is stable for the prior alone
    (below 1 it is with any ``|A| <= 1``); its code rescales the data's gradient to the norm of the prior's, which
    leaves no stated target. Here the gradient is what it is, and `h` is smaller.

    Attributes
    ----------
    sigma_min: smoothing of the prior in the target, per real channel.
    sigma_max, levels: geometric prior levels, `sigma_max` to `sigma_min`; as many per octave as the paper has.
    steps_per_level, final_steps: Langevin steps at each, and extra steps at the last.
    h: step size over ``sigma^2``.

    Evaluations: ``levels * steps_per_level + final_steps``.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["csgm_langevin"] = "csgm_langevin"
    sigma_min: float = 0.02
    sigma_max: float = 1.24
    levels: int = 912
    steps_per_level: int = 3
    final_steps: int = 1
    h: float = 0.3

    def __post_init__(self) -> None:
        require_positive(self, "sigma_min", "h")
        require_at_least(self, self.sigma_min, "sigma_max")
        require_at_least(self, 2, "levels")
        require_at_least(self, 1, "steps_per_level")
        require_at_least(self, 0, "final_steps")

    def plan(self, posterior: Posterior) -> list[Step]:
        sigmas = diffusion_levels(self.sigma_max, self.sigma_min, self.levels - 1)
        steps = [Step("langevin", i, s, eta=posterior.noise_std) for i, s in enumerate(sigmas)]
        return [step for step in steps for _ in range(self.steps_per_level)] + steps[-1:] * self.final_steps

    def start(self, posterior: Posterior, streams: NoiseStreams, warm_start: Image | None) -> State:
        refuse_terms(self, posterior)
        return State(posterior, self.sigma_max * streams.complex(*posterior.operator.shape))

    def step(self, streams: NoiseStreams, state: State, step: Step) -> State:
        posterior, operator = state.posterior, state.posterior.operator
        variance = step.sigma**2 + step.eta**2
        pull = operator.adjoint(operator.residual(state.x, posterior.kspace)) / variance
        size = self.h * step.sigma**2
        kick = math.sqrt(2 * size) * streams.complex(*operator.shape)
        return replace(state, x=state.x + size * (posterior.prior_score(state.x, step.sigma) + pull) + kick)
