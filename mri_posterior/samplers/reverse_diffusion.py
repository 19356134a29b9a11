"""Reverse diffusion: samples of the prior, or of ``p(x | x~)`` when started from a noised image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Complex

from mri_posterior.noise import NoiseStreams
from mri_posterior.posterior import Posterior
from mri_posterior.priors import Prior
from mri_posterior.samplers.schedules import diffusion_levels
from mri_posterior.samplers.step import State, Step

Image = Complex[torch.Tensor, "n H W"]


def diffusion_steps(sigma_max: float, sigma_min: float, steps: int) -> list[Step]:
    levels = diffusion_levels(sigma_max, sigma_min, steps)
    return [Step("diffusion", i, sigma=a, next_sigma=b) for i, (a, b) in enumerate(pairwise(levels))]


def diffusion_step(prior: Prior, streams: NoiseStreams, state: State, step: Step) -> State:
    """One step of the reverse SDE from noise level ``step.sigma`` to ``step.next_sigma``.

    The SDE, not the ODE: only with fresh noise is the result a *sample* of ``p(x | x~)``. Second-order
    multistep exponential integrator (SDE-DPM-Solver++(2M), Lu et al. 2022, in variance-exploding form):
    exact when the denoiser is linear in ``log sigma`` over the step.
    """
    denoised = prior(state.x, step.sigma)
    log_ratio = math.log(step.sigma / step.next_sigma)
    keep = math.exp(-2 * log_ratio)
    target = denoised
    if state.denoised is not None:
        target = denoised + (denoised - state.denoised) * (log_ratio / state.log_ratio / 2)
    x = keep * state.x + (1 - keep) * target
    x = x + step.next_sigma * math.sqrt(1 - keep) * streams.complex(*state.x.shape[1:])
    return replace(state, x=x, denoised=denoised, log_ratio=log_ratio)


@dataclass(frozen=True)
class ReverseDiffusion:
    """Samples of the prior alone, ``p_sigma_min``, to look at a prior: it ignores the measurement.

    Attributes
    ----------
    sigma_max: must dwarf the prior's own spread, since the start is pure noise of this level.
    sigma_min: of the result.
    steps: network evaluations.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["reverse_diffusion"] = "reverse_diffusion"
    sigma_max: float = 10.0
    sigma_min: float = 0.01
    steps: int = 60

    def plan(self, posterior: Posterior) -> list[Step]:
        return diffusion_steps(self.sigma_max, self.sigma_min, self.steps)

    def start(self, posterior: Posterior, streams: NoiseStreams, warm_start: Image | None) -> State:
        return State(posterior, self.sigma_max * streams.complex(*posterior.operator.shape))

    def step(self, streams: NoiseStreams, state: State, step: Step) -> State:
        return diffusion_step(state.posterior.prior, streams, state, step)
