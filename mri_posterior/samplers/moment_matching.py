"""Moment matching: the likelihood of a noisy state by the denoiser's mean and covariance.

Finzi et al. 2023; Peng et al. 2024; Rozet et al. 2024 (Algorithm 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Complex

from mri_posterior.noise import NoiseStreams
from mri_posterior.samplers.guided_diffusion import GuidedDiffusion, SmoothedPrior
from mri_posterior.samplers.reverse_diffusion import diffusion_step
from mri_posterior.samplers.step import State, Step, require_at_least
from mri_posterior.solvers import conjugate_gradient

Image = Complex[torch.Tensor, "n H W"]


@dataclass(frozen=True)
class MomentMatching(GuidedDiffusion):
    """Reverse diffusion with the conditional mean ``E[x_0 | x, y]`` of the Gaussian that matches ``p(x_0 | x)``.

    Its mean is ``D``, its covariance ``V = sigma^2 dD/dx``, so the conditional mean is
    ``D + V A^H (A V A^H + eta^2)^-1 (y - A D)``, by conjugate gradients on products with the transposed Jacobian, which
    is symmetric. On Gaussian priors this is exact as steps and iterations grow: an oracle to hold others against.

    Attributes
    ----------
    cg_tolerance, cg_iterations: of the solve in data space. A network's Jacobian is only nearly symmetric, and times
        ``sigma^2`` its errors are large: iterations beyond two amplify them.
    sigma_min, sigma_max, steps: see `GuidedDiffusion`.

    Evaluations: at most ``steps * (2 + cg_iterations)``; each product with the Jacobian counts as one.
    """

    name: Literal["moment_matching"] = "moment_matching"
    cg_tolerance: float = 1e-4
    cg_iterations: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "cg_iterations")

    def step(self, streams: NoiseStreams, state: State, step: Step) -> State:
        if step.next_sigma == 0:
            return replace(state, x=self._conditional_mean(state, state.x, step.sigma))
        return diffusion_step(lambda x, sigma: self._conditional_mean(state, x, sigma), streams, state, step)

    def _conditional_mean(self, state: State, x: Image, sigma: float) -> Image:
        posterior, operator = state.posterior, state.posterior.operator
        prior = SmoothedPrior(posterior.prior, self.sigma_min)

        def covariance(v: Image) -> Image:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (product,) = torch.autograd.grad(prior(leaf, sigma), leaf, v)
            return sigma**2 * product

        def gram(u: torch.Tensor) -> torch.Tensor:
            data = u.reshape(-1, *operator.data_shape)
            seen = operator.forward(covariance(operator.adjoint(data)))
            return (seen + posterior.noise_std**2 * data).reshape(u.shape)

        denoised = prior(x, sigma)
        residual = operator.residual(denoised, posterior.kspace)
        solved = conjugate_gradient(
            gram, residual.reshape(len(x), 1, -1), tolerance=self.cg_tolerance, max_iterations=self.cg_iterations
        )
        return denoised + covariance(operator.adjoint(solved.reshape(residual.shape)))
