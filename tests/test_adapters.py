"""Adapted denoisers against the exact one of a Gaussian prior, whose other parametrisations are known too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mri_posterior.exact import power_law, white
from mri_posterior.priors import GaussianPrior
from mri_posterior.priors.adapters import EDM, VarianceExploding, VariancePreserving, from_channels, from_epsilon

SHAPE = (6, 5)
SPECTRUM = power_law(SHAPE).float()
EXACT = GaussianPrior(spectrum=SPECTRUM)
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
LEVELS = ((1 - ALPHAS) / ALPHAS).sqrt()
SIGMA_DATA = 0.4
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


def alpha_at(t: torch.Tensor) -> torch.Tensor:
    """``A_t`` at fractional steps: sigmas in between are geometric. ``[n, 1, 1]``, double precision."""
    sigma = torch.from_numpy(np.exp(np.interp(t.double(), np.arange(1000), LEVELS.log())))[:, None, None]
    return 1 / (1 + sigma**2)


# What each network predicts when x_0 is Gaussian, per frequency: a multiple of its input, which for
# x_t = sqrt(a) x_0 + sqrt(1 - a) e has variance a S + 1 - a and covariance sqrt(a) S with x_0, sqrt(1 - a) with e.


def epsilon(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    a = alpha_at(t)
    return in_channels(x_t, ((1 - a).sqrt() / (a * SPECTRUM + 1 - a)).float())


def velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """``E[sqrt(a) e - sqrt(1 - a) x_0 | x_t]``."""
    a = alpha_at(t)
    return in_channels(x_t, ((a * (1 - a)).sqrt() * (1 - SPECTRUM) / (a * SPECTRUM + 1 - a)).float())


def clean(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    a = alpha_at(t)
    return in_channels(x_t, (a.sqrt() * SPECTRUM / (a * SPECTRUM + 1 - a)).float())


def ve_score(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return in_channels(x, -1 / (SPECTRUM + sigma[:, None, None] ** 2))


def ve_epsilon(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    sigma = sigma[:, None, None]
    return in_channels(x, sigma / (SPECTRUM + sigma**2))


def ve_clean(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return denoiser(x, sigma[:, None, None, None])


def edm_target(scaled: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
    """``E[(x_0 - c_skip x) / c_out | x]``, ``x = sqrt(sigma^2 + d^2) scaled``: the mean of what EDM trains on."""
    sigma = (4 * c_noise).exp()[:, None, None]
    return in_channels(scaled, sigma * (SPECTRUM - SIGMA_DATA**2) / (SIGMA_DATA * (SPECTRUM + sigma**2)))


ADAPTED = {
    "channels": from_channels(denoiser),
    "vp epsilon": from_epsilon(epsilon, ALPHAS),
    "vp v": from_channels(VariancePreserving(velocity, ALPHAS, "v_prediction")),
    "vp sample": from_channels(VariancePreserving(clean, ALPHAS, "sample")),
    "ve score": from_channels(VarianceExploding(ve_score)),
    "ve epsilon": from_channels(VarianceExploding(ve_epsilon, "epsilon")),
    "ve sample": from_channels(VarianceExploding(ve_clean, "sample")),
    "edm": from_channels(EDM(edm_target, SIGMA_DATA)),
    "edm negative": from_channels(EDM(lambda x, c: -edm_target(x, c), SIGMA_DATA, sign=-1)),
}


@pytest.mark.parametrize("prior", ADAPTED.values(), ids=ADAPTED.keys())
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("sigma", [0.02, 0.3, 5.0, torch.tensor(0.3), torch.tensor([0.02, 0.3, 5.0])], ids=str)
def test_adapted_denoisers_are_the_exact_one(prior, dtype, sigma, generator):
    x = white(generator, 3, *SHAPE, dtype=dtype)
    found = prior(x, sigma)
    assert found.dtype == dtype
    assert torch.allclose(found, EXACT(x, sigma).to(dtype), atol=ROUNDING)


def test_steps_without_signal_are_no_levels():
    """Networks trained to zero terminal signal-to-noise ratio end at an infinite sigma."""
    adapted = VariancePreserving(velocity, torch.cat([ALPHAS, torch.zeros(1, dtype=torch.float64)]), "v_prediction")
    assert adapted.sigma_range == pytest.approx((float(LEVELS[0]), float(LEVELS[-1])))
    x = torch.ones(1, *SHAPE, dtype=torch.complex64)
    assert torch.allclose(from_channels(adapted)(x, 5.0), EXACT(x, 5.0).to(x.dtype), atol=ROUNDING)


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
