"""Plug-and-play diffusion models: split Gibbs sampling (Wu, Sun, Chen et al., NeurIPS 2024, Algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Complex

from mri_posterior.noise import NoiseStreams
from mri_posterior.posterior import Posterior
from mri_posterior.samplers.guided_diffusion import data_draw
from mri_posterior.samplers.reverse_diffusion import diffusion_step, diffusion_steps
from mri_posterior.samplers.step import State, Step, refuse_terms, require_at_least, require_positive

Image = Complex[torch.Tensor, "n H W"]


@dataclass(frozen=True)
class PnPDM:
    """A Gibbs sampler of an image `x` that the prior knows and a noised copy `z` of it that the data know.

    In turns ``z ~ exp(-|A z - y|^2 / 2 eta^2 - |z - x|^2 / 2 rho^2)``, a Gaussian, and ``x ~ p(x | z)``, by reverse
    diffusion from level `rho`. At a fixed `rho` the images have the posterior of noisier data, of covariance
    ``eta^2 + rho^2 A A^H``; with `rho` going slowly to 0 it is the target.

    Attributes
    ----------
    sigma_min: smoothing of the prior in the target, per real channel.
    rho_max, rho_min, iterations: `rho` falls geometrically; the paper's decay is 0.93 per iteration.
    diffusion_steps: of each reverse diffusion.
    cg_tolerance, cg_iterations: of the draw of `z`.

    Evaluations: ``iterations * diffusion_steps``.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["pnp_dm"] = "pnp_dm"
    sigma_min: float = 0.02
    rho_max: float = 10.0
    rho_min: float = 0.01
    iterations: int = 100
    diffusion_steps: int = 10
    cg_tolerance: float = 1e-5
    cg_iterations: int = 60

    def __post_init__(self) -> None:
        require_positive(self, "sigma_min", "rho_min")
        require_at_least(self, self.rho_min, "rho_max")
        require_at_least(self, 1, "iterations", "diffusion_steps", "cg_iterations")

    def plan(self, posterior: Posterior) -> list[Step]:
        steps = []
        for i in range(self.iterations):
            rho = self.rho_max * (self.rho_min / self.rho_max) ** (i / max(self.iterations - 1, 1))
            steps.append(Step("data", i, rho, eta=posterior.noise_std))
            steps += diffusion_steps(math.hypot(rho, self.sigma_min), self.sigma_min, self.diffusion_steps)
        return steps

    def start(self, posterior: Posterior, streams: NoiseStreams, warm_start: Image | None) -> State:
        refuse_terms(self, posterior)
        # The first rho dwarfs images: where nothing is measured z is then noise of the level that the prior is told.
        zeros = torch.zeros(len(streams), *posterior.operator.shape, dtype=streams.dtype, device=streams.device)
        return State(posterior, zeros)

    def step(self, streams: NoiseStreams, state: State, step: Step) -> State:
        if step.phase == "diffusion":
            return diffusion_step(state.posterior.prior, streams, state, step)
        z = data_draw(streams, state.posterior, state.x, step.sigma, self.cg_tolerance, self.cg_iterations)
        return replace(state, x=z, denoised=None)
