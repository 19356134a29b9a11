"""Denoisers of other libraries as priors: two real channels instead of complex images, other parametrisations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Complex, Float

Channels = Float[torch.Tensor, "n 2 H W"]
ComplexDenoiser = Callable[[Complex[torch.Tensor, "n H W"], float | torch.Tensor], Complex[torch.Tensor, "n H W"]]


def from_channels(denoiser: Callable[[Channels, Float[torch.Tensor, "n 1 1 1"]], Channels]) -> ComplexDenoiser:
    """A prior from ``denoiser(x, sigma) -> E[x_0 | x]`` on float32 channels (real, imaginary): deepinv's interface.

    `sigma`, per real channel, reaches it as ``[n, 1, 1, 1]``. The result has the precision of the images.
    """

    def prior(x: Complex[torch.Tensor, "n H W"], sigma: float | torch.Tensor) -> Complex[torch.Tensor, "n H W"]:
        channels = torch.view_as_real(x.to(torch.complex64)).movedim(-1, 1).contiguous()
        level = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        denoised = denoiser(channels, level[:, None, None, None])
        return torch.view_as_complex(denoised.movedim(1, -1).contiguous()).to(x.dtype)

    return prior


def from_epsilon(
    epsilon: Callable[[Channels, Float[torch.Tensor, n]], Channels], alphas_cumprod: Float[torch.Tensor, steps]
) -> ComplexDenoiser:
    """A prior from a variance-preserving network that predicts the noise (DDPM, Ho et al. 2020): diffusers' default.

    With ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e``, the image ``x_t / sqrt(a_t)`` has noise ``sigma_t = sqrt((1 -
    a_t) / a_t)``; so ``E[x_0 | x] = x - sigma epsilon(x / sqrt(1 + sigma^2), t)`` where ``sigma_t = sigma``. Between
    steps, `t` is interpolated in ``log sigma``.

    Parameters
    ----------
    epsilon: ``epsilon(x_t, t)`` on float32 channels (real, imaginary); `t` is fractional, one per image.
    alphas_cumprod: ``a_t``, decreasing: ``scheduler.alphas_cumprod``.

    Raises
    ------
    ValueError: (the prior, when called) a `sigma` beyond the levels of the network.
    """
    levels = ((1 - alphas_cumprod.double()) / alphas_cumprod.double()).sqrt().log().cpu()

    def denoiser(x: Channels, sigma: Float[torch.Tensor, "n 1 1 1"]) -> Channels:
        wanted = sigma.flatten().double().log().cpu()
        # Single precision may put a sigma that was meant to be the first or last level just outside.
        if bool(((wanted < levels[0] - 1e-6) | (wanted > levels[-1] + 1e-6)).any()):
            first, last = levels[[0, -1]].exp().tolist()
            raise ValueError(f"sigma {sigma.flatten().tolist()}: the network knows {first:.4g} to {last:.4g}")
        above = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        t = (above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)).to(x.device, torch.float32)
        return x - sigma * epsilon(x / (1 + sigma**2).sqrt(), t)

    return from_channels(denoiser)
