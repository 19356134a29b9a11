"""DiffPIR: denoise, proximal step of the data, re-noise (Zhu, Zhang, Liang et al., CVPRW 2023, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mri_posterior.errors import UserError
from mri_posterior.noise import NoiseStreams
from mri_posterior.samplers.guided_diffusion import GuidedDiffusion, SmoothedPrior, data_mean, renoise
from mri_posterior.samplers.step import State, Step, require_at_least, require_positive


@dataclass(frozen=True)
class DiffPIR(GuidedDiffusion):
    """Plug-and-play restoration with a diffusion prior: sharp images fast, with no stated law.

    Each step takes the mean of ``N(x; D(x_t), sigma^2 / lambda) * likelihood`` (half-quadratic splitting) and goes on
    with the noise that this implies, of which the share `fresh` is renewed. The spread of the results is that of
    the injected noise, not of a posterior.

    Attributes
    ----------
    prior_weight: the paper's ``lambda``: how much more the denoiser is trusted than its noise level says. Tuned for
        PSNR, problem by problem (1 to 163 are in use); with large ones the data lose: here one that serves many.
    fresh: the paper's ``zeta``, as tuned for MRI.
    cg_tolerance, cg_iterations: of the proximal step.
    sigma_min, sigma_max, steps: see `GuidedDiffusion`.

    Evaluations: `steps`.
    """

    name: Literal["diffpir"] = "diffpir"
    prior_weight: float = 7.0
    fresh: float = 0.114
    cg_tolerance: float = 1e-5
    cg_iterations: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "prior_weight")
        require_at_least(self, 1, "cg_iterations")
        if not 0 <= self.fresh <= 1:
            raise UserError(f"sampler.fresh {self.fresh}: it is a share, between 0 and 1")

    def step(self, streams: NoiseStreams, state: State, step: Step) -> State:
        denoised = SmoothedPrior(state.posterior.prior, self.sigma_min)(state.x, step.sigma)
        std = step.sigma / self.prior_weight**0.5
        clean = data_mean(state.posterior, denoised, std, self.cg_tolerance, self.cg_iterations)
        noise = (state.x - clean) / step.sigma
        return replace(state, x=renoise(streams, clean, noise, step.next_sigma, self.fresh))
