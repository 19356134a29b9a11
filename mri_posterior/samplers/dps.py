"""Diffusion posterior sampling (Chung, Kim, Mccann, Klasky, Ye, ICLR 2023, Algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from mri_posterior.noise import NoiseStreams
from mri_posterior.samplers.guided_diffusion import GuidedDiffusion, SmoothedPrior, ancestral_share, renoise
from mri_posterior.samplers.step import State, Step, require_positive


@dataclass(frozen=True)
class DPS(GuidedDiffusion):
    """The most used peer: reverse diffusion, pushed at every step down the gradient of ``|y - A D(x)|``.

    The push has a length of its own choosing, whatever the noise level: the result fits the data but follows no
    stated law. Each sample's gradient is scaled by its own norm.

    Attributes
    ----------
    guidance: ``zeta`` for 1000 steps of an image of 320 x 320 pixels of magnitude 1. The push per pixel, summed over
        the way, is kept: ``zeta * (1000 / steps) * sqrt(pixels) / 320``.
    sigma_min, sigma_max, steps: see `GuidedDiffusion`.

    The paper's variance-preserving coordinates shrink an image of level sigma by ``sqrt(1 + sigma^2)``; written in
    ours, the push gets the factor ``1 + sigma^2``, of which the denoiser's Jacobian takes away as much.

    Evaluations: `steps`, each with its gradient.
    """

    name: Literal["dps"] = "dps"
    steps: int = 1000
    guidance: float = 0.589

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "guidance")

    def step(self, streams: NoiseStreams, state: State, step: Step) -> State:
        posterior = state.posterior
        with torch.enable_grad():
            x = state.x.detach().requires_grad_()
            denoised = SmoothedPrior(posterior.prior, self.sigma_min)(x, step.sigma)
            misfit = torch.linalg.vector_norm(posterior.operator.residual(denoised, posterior.kspace).flatten(1), dim=1)
            (gradient,) = torch.autograd.grad(misfit.sum(), x)
        denoised = denoised.detach()
        noise = (state.x - denoised) / step.sigma
        moved = renoise(streams, denoised, noise, step.next_sigma, ancestral_share(step))
        length = self.guidance * (1000 / self.steps) * math.sqrt(math.prod(posterior.operator.shape)) / 320
        length *= math.sqrt((1 + step.sigma**2) * (1 + step.next_sigma**2))
        return replace(state, x=moved - length * gradient)
