"""Denoisers of other libraries as priors: two real channels instead of complex images, other parametrisations.

A network of a diffusion ``x_t = a x_0 + b e``, e white, sees ``x = x_t / a`` at our ``sigma = b / a``. Each class here
turns one family of networks into ``denoiser(x, sigma) -> E[x_0 | x]`` on channels; `from_channels` takes it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Complex, Float

Channels = Float[torch.Tensor, "n c H W"]
Levels = Float[torch.Tensor, "n 1 1 1"]
Network = Callable[[Channels, Float[torch.Tensor, "n"]], Channels]
ComplexDenoiser = Callable[[Complex[torch.Tensor, "n H W"], float | torch.Tensor], Complex[torch.Tensor, "n H W"]]


def from_channels(denoiser: Callable[[Float[torch.Tensor, "n 2 H W"], Levels], Channels]) -> ComplexDenoiser:
    """A prior from ``denoiser(x, sigma) -> E[x_0 | x]`` on float32 channels (real, imaginary): deepinv's interface.

    `sigma`, per real channel, reaches it as ``[n, 1, 1, 1]``. The result has the precision of the images.
    """

    def prior(x: Complex[torch.Tensor, "n H W"], sigma: float | torch.Tensor) -> Complex[torch.Tensor, "n H W"]:
        channels = torch.view_as_real(x.to(torch.complex64)).movedim(-1, 1).contiguous()
        level = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        denoised = denoiser(channels, level[:, None, None, None])
        return torch.view_as_complex(denoised.movedim(1, -1).contiguous()).to(x.dtype)

    return prior


def from_epsilon(network: Network, alphas_cumprod: Float[torch.Tensor, steps]) -> ComplexDenoiser:
    """A prior from a variance-preserving network that predicts the noise: `VariancePreserving` on complex images.

    Parameters
    ----------
    network: ``epsilon(x_t, t)`` on float32 channels (real, imaginary); `t` is fractional, one per image.
    alphas_cumprod: ``A_t``, decreasing: ``scheduler.alphas_cumprod``.

    Raises
    ------
    ValueError: (the prior, when called) a `sigma` beyond the levels of the network.
    """
    return from_channels(VariancePreserving(network, alphas_cumprod))


class VariancePreserving(torch.nn.Module):
    """A denoiser from a network of ``x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) e`` (DDPM, Ho et al. 2020).

    The network sees ``x_t = x / sqrt(1 + sigma^2)`` and the step `t` at which ``sigma_t = sqrt((1 - A_t) / A_t)`` is
    sigma; between steps, `t` is interpolated in ``log sigma``. What it predicts gives ``E[x_0 | x]`` as

    - ``epsilon``: ``x - sigma epsilon``
    - ``v_prediction``: ``x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v``, as ``v = sqrt(A) e - sqrt(1 - A) x_0``
      (Salimans and Ho 2022)
    - ``sample``: itself.

    Parameters
    ----------
    network: ``network(x_t, t)``; `t` is fractional, one per image.
    alphas_cumprod: ``A_t``, decreasing. Steps without signal (``A_t = 0``) are left out: their sigma is infinite.

    Raises
    ------
    ValueError: (when called) a `sigma` beyond the levels of the network.
    """

    def __init__(
        self,
        network: Network,
        alphas_cumprod: Float[torch.Tensor, steps],
        predicts: Literal["epsilon", "v_prediction", "sample"] = "epsilon",
    ):
        super().__init__()
        self.network, self.predicts = network, predicts
        kept = alphas_cumprod[alphas_cumprod > 0].double().cpu()
        # Not a buffer: it stays in double precision on the CPU wherever the network goes.
        self._log_levels = ((1 - kept) / kept).sqrt().log()

    @property
    def sigma_range(self) -> tuple[float, float]:
        first, last = self._log_levels[[0, -1]].exp().tolist()
        return first, last

    def step_of(self, sigma: Levels) -> Float[torch.Tensor, n]:
        """The fractional step of each level."""
        levels, wanted = self._log_levels, sigma.flatten().double().log().cpu()
        # Single precision may put a sigma that was meant to be the first or last level just outside.
        if bool(((wanted < levels[0] - 1e-6) | (wanted > levels[-1] + 1e-6)).any()):
            first, last = self.sigma_range
            raise ValueError(f"sigma {sigma.flatten().tolist()}: the network knows {first:.4g} to {last:.4g}")
        above = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        t = above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)
        return t.to(sigma.device, torch.float32)

    def forward(self, x: Channels, sigma: Levels) -> Channels:
        amplitude = (1 + sigma**2).rsqrt()
        output = self.network(amplitude * x, self.step_of(sigma))
        if self.predicts == "epsilon":
            return x - sigma * output
        return output if self.predicts == "sample" else amplitude * (amplitude * x - sigma * output)


class VarianceExploding(torch.nn.Module):
    """A denoiser from ``network(x, sigma)`` on ``x = x_0 + sigma e`` (Song et al. 2021), sigma one per image.

    It predicts the ``score``, ``E[x_0 | x] = x + sigma^2 score`` (diffusers' convention), the noise (``epsilon``: ``x -
    sigma epsilon``) or the image (``sample``).
    """

    def __init__(self, network: Network, predicts: Literal["score", "epsilon", "sample"] = "score"):
        super().__init__()
        self.network, self.predicts = network, predicts

    def forward(self, x: Channels, sigma: Levels) -> Channels:
        output = self.network(x, sigma.flatten())
        if self.predicts == "score":
            return x + sigma**2 * output
        return output if self.predicts == "sample" else x - sigma * output


class EDM(torch.nn.Module):
    """A denoiser from an EDM-preconditioned network (Karras et al. 2022, Table 1), with ``d = sigma_data``:

    ``E[x_0 | x] = d^2 / (sigma^2 + d^2) x + sign sigma d / sqrt(sigma^2 + d^2) F(x / sqrt(sigma^2 + d^2), c_noise)``,
    ``c_noise = log(sigma) / 4``. `sign` is 1, or -1 for a network of the negative (diffusers' ``v_prediction``).
    """

    def __init__(self, network: Network, sigma_data: float, sign: Literal[1, -1] = 1):
        super().__init__()
        self.network, self.sigma_data, self.sign = network, sigma_data, sign

    def forward(self, x: Channels, sigma: Levels) -> Channels:
        total = sigma**2 + self.sigma_data**2
        output = self.network(x * total.rsqrt(), sigma.flatten().log() / 4)
        return (self.sigma_data**2 / total) * x + self.sign * sigma * self.sigma_data * total.rsqrt() * output
