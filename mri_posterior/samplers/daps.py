"""Decoupled annealing posterior sampling (Zhang, Chu, Berner et al., CVPR 2025, Algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Complex

from mri_posterior.errors import UserError
from mri_posterior.noise import NoiseStreams
from mri_posterior.samplers.guided_diffusion import GuidedDiffusion, SmoothedPrior, data_draw, noise_levels, renoise
from mri_posterior.samplers.step import State, Step, require_at_least

Image = Complex[torch.Tensor, "n H W"]


@dataclass(frozen=True)
class DAPS(GuidedDiffusion):
    """Successive levels decoupled by noising afresh an image that was drawn given the data.

    At each level the probability-flow ODE takes the state to an image ``x_0``; an image is drawn from
    ``N(x; x_0, sigma^2) * likelihood``, which stands for ``p(x | x_t, y)``; noise of the next level is put on it. The
    Gaussian is too wide where the data are silent: of a Gaussian prior of variance S there, the variance V of
    the images goes, level by level, to ``S/(S + sigma^2) (V + sigma^2) + sigma^2``: towards 2 S with many levels.

    Attributes
    ----------
    ode_steps: Euler steps of the ODE at each level.
    draw: ``exact``, by conjugate gradients, possible as `A` is linear, or the paper's ``langevin``.
    langevin_steps, langevin_h: number of Euler steps and their length over the stable ``1 / (1/sigma^2 + 1/eta^2)``.
        The paper tunes the length per task.
    cg_tolerance, cg_iterations: of the exact draw.
    sigma_min, sigma_max, steps: see `GuidedDiffusion`.

    Evaluations: ``steps * ode_steps``.
    """

    name: Literal["daps"] = "daps"
    steps: int = 200
    ode_steps: int = 5
    draw: Literal["exact", "langevin"] = "exact"
    langevin_steps: int = 100
    langevin_h: float = 0.1
    cg_tolerance: float = 1e-5
    cg_iterations: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "ode_steps", "langevin_steps", "cg_iterations")
        if not 0 < self.langevin_h < 2:
            raise UserError(f"sampler.langevin_h {self.langevin_h}: it must lie between 0 and 2, to be stable")

    def step(self, streams: NoiseStreams, state: State, step: Step) -> State:
        prior, x = SmoothedPrior(state.posterior.prior, self.sigma_min), state.x
        for sigma, next_sigma in pairwise(noise_levels(step.sigma, self.sigma_min, self.ode_steps)):
            denoised = prior(x, sigma)
            x = denoised + next_sigma / sigma * (x - denoised)
        if self.draw == "exact":
            x = data_draw(streams, state.posterior, x, step.sigma, self.cg_tolerance, self.cg_iterations)
        else:
            x = self._langevin(streams, state, x, step.sigma)
        return replace(state, x=renoise(streams, x, torch.zeros_like(x), step.next_sigma, share=1.0))

    def _langevin(self, streams: NoiseStreams, state: State, centre: Image, sigma: float) -> Image:
        posterior, operator, eta = state.posterior, state.posterior.operator, state.posterior.noise_std
        step_size = self.langevin_h / (1 / sigma**2 + 1 / eta**2)
        x = centre
        for _ in range(self.langevin_steps):
            drift = (centre - x) / sigma**2 + operator.adjoint(operator.residual(x, posterior.kspace)) / eta**2
            x = x + step_size * drift + math.sqrt(2 * step_size) * streams.complex(*x.shape[1:])
        return x
