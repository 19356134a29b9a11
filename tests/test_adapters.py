"""Adapted denoisers against the exact one of a Gaussian prior, whose other parametrisations are known too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mri_posterior.exact import power_law, white
from mri_posterior.priors import GaussianPrior
from mri_posterior.priors.adapters import from_channels, from_epsilon

SHAPE = (6, 5)
SPECTRUM = power_law(SHAPE).float()
EXACT = GaussianPrior(spectrum=SPECTRUM)
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
LEVELS = ((1 - ALPHAS) / ALPHAS).sqrt()
# float32 rounding of numbers of order 1, a few dozen operations deep.
ROUNDING = 1e-5


def in_channels(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """A gain ``[n, H, W]`` in Fourier space, applied to channels."""
    assert x.dtype == torch.float32
    assert x.shape[1] == 2
    filtered = torch.fft.ifft2(gain * torch.fft.fft2(torch.complex(x[:, 0], x[:, 1])))
    return torch.stack([filtered.real, filtered.imag], 1)


def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return in_channels(x, SPECTRUM / (SPECTRUM + sigma[:, 0] ** 2))


def epsilon(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """``E[e | x_t] = sqrt(1 - a) x_t / (a S + 1 - a)`` per frequency; between steps, `a` from geometric sigmas."""
    sigma = torch.from_numpy(np.exp(np.interp(t.double(), np.arange(1000), LEVELS.log())))[:, None, None]
    a = 1 / (1 + sigma**2)
    return in_channels(x_t, ((1 - a).sqrt() / (a * SPECTRUM + 1 - a)).float())


@pytest.mark.parametrize("prior", [from_channels(denoiser), from_epsilon(epsilon, ALPHAS)], ids=["channels", "epsilon"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("sigma", [0.02, 0.3, 5.0, torch.tensor(0.3), torch.tensor([0.02, 0.3, 5.0])], ids=str)
def test_adapted_denoisers_are_the_exact_one(prior, dtype, sigma, generator):
    x = white(generator, 3, *SHAPE, dtype=dtype)
    found = prior(x, sigma)
    assert found.dtype == dtype
    assert torch.allclose(found, EXACT(x, sigma).to(dtype), atol=ROUNDING)


def test_a_level_of_the_network_has_its_own_step():
    steps = []

    def record(x, t):
        steps.append(t)
        return x

    prior, x = from_epsilon(record, ALPHAS), torch.ones(1, *SHAPE, dtype=torch.complex64)
    for t in (0, 1, 700, 999):
        prior(x, float(LEVELS[t]))
    prior(x, float((LEVELS[300] * LEVELS[301]).sqrt()))
    # t is float32 and sigma's float32 rounding is amplified by dt / d log(sigma), up to about 1000.
    assert torch.cat(steps).tolist() == pytest.approx([0, 1, 700, 999, 300.5], abs=2e-3)


@pytest.mark.parametrize("sigma", [0.009, 200.0])
def test_levels_that_the_network_never_saw_are_refused(sigma):
    prior = from_epsilon(epsilon, ALPHAS)
    with pytest.raises(ValueError, match=r"knows 0\.01 to 157"):
        prior(torch.ones(1, *SHAPE, dtype=torch.complex64), sigma)
