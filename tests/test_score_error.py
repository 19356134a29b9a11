"""Score errors: known perturbations have their known size, and bounds lie on their sides of it.

The exact denoiser of a stationary Gaussian prior, perturbed. A perturbation ``a (x - D*)`` has error
``e^2 = sum_k w_k (u_k^2 + v_k^2) / (2 p)`` with ``w_k = a^2 sigma^2 / (S_k + sigma^2)`` and unit normals u, v over the
p frequencies: mean ``mean(w)``, variance ``sum(w^2) / p^2``. Tests allow five standard errors.
"""

from __future__ import annotations

import math

import pytest
import torch

from mri_posterior.exact import power_law, white
from mri_posterior.priors import GaussianPrior
from mri_posterior.score_error import bounds, difference, score_error, summarise

SHAPE = (12, 10)
SIGMA = 0.2
SPECTRUM = power_law(SHAPE)
EXACT = GaussianPrior(spectrum=SPECTRUM)
STRIPES = ((-1.0) ** torch.arange(10)).expand(SHAPE) * torch.tensor(1 + 1j, dtype=torch.complex128)


@pytest.fixture(scope="module")
def clean() -> torch.Tensor:
    noise = white(torch.Generator().manual_seed(3), 400, *SHAPE)
    return torch.fft.ifft2(SPECTRUM.sqrt() * torch.fft.fft2(noise))


def bold(x, sigma, excess=0.3):
    """Removes a share of `excess` more than the exact denoiser does."""
    denoised = EXACT(x, sigma)
    return denoised - excess * (x - denoised)


def patterned(x, sigma):
    """Stripes of 0.1 of the noise level: an answer that depends on where the image begins."""
    return EXACT(x, sigma) + 0.1 * sigma * STRIPES


def test_the_exact_denoiser_has_no_error(clean):
    assert float(score_error(EXACT, EXACT, clean, SIGMA).max()) == 0
    found = bounds(EXACT, clean, SIGMA)
    # What a fitted correction gains over the truth is at most nothing, up to the judged half's noise.
    assert abs(found.lower_mean_square) < 5 * found.lower_standard_error + 1e-12
    assert found.least < found.most


@pytest.mark.parametrize("sigma", [0.05, 1.0])
def test_the_unit_is_that_of_the_noise(clean, sigma):
    """A score wrong by as much as the noise's own, ``1/sigma`` in every real channel, has error 1."""
    wrong = lambda x, s: EXACT(x, s) + s * STRIPES  # noqa: E731
    errors = score_error(wrong, EXACT, clean[:4], sigma)
    assert torch.allclose(errors, torch.ones(4, dtype=errors.dtype), atol=1e-12)


def test_moments_of_a_known_perturbation(clean):
    errors = score_error(bold, EXACT, clean, SIGMA)
    found = summarise(errors)
    weights = 0.3**2 * SIGMA**2 / (SPECTRUM + SIGMA**2)
    mean, variance = float(weights.mean()), float(weights.square().sum()) / weights.numel() ** 2
    standard_error = math.sqrt(variance / len(clean))
    assert found.mean_square == pytest.approx(mean, abs=5 * standard_error)
    # Relative standard error of a standard deviation of nearly normal numbers: 1 / sqrt(2 n).
    assert found.standard_error == pytest.approx(standard_error, rel=5 / math.sqrt(2 * len(clean)))
    # d(e^4) = 2 e^2 d(e^2), e^2 nearly constant.
    assert found.mean_fourth == pytest.approx(mean**2 + variance, abs=5 * 2 * mean * standard_error)
    assert found.quantiles["0.5"] == pytest.approx(math.sqrt(mean), rel=0.02)
    ordered = errors.sort().values
    assert found.tail_means["0.9"] == pytest.approx(float(ordered[-40:].mean()))
    assert int((errors > found.quantiles["0.99"]).sum()) == 4


def test_a_quantile_beyond_all_images_is_not_made_up(clean):
    found = summarise(score_error(bold, EXACT, clean[:100], SIGMA))
    assert found.quantiles["0.999"] is None
    assert found.tail_means["0.999"] is None
    assert found.tail_means["0.99"] is not None


@pytest.mark.parametrize("wrong", [bold, patterned])
def test_bounds_lie_on_both_sides_of_the_truth(clean, wrong):
    true = summarise(score_error(wrong, EXACT, clean, SIGMA))
    found = bounds(wrong, clean, SIGMA)
    assert found.least**2 < true.mean_square < found.denoising.mean_square
    assert true.mean_fourth < found.denoising.mean_fourth
    assert all(true.quantiles[s] < found.denoising.tail_means[s] for s in ("0.5", "0.9", "0.99"))
    # Both errors are in the span of the corrections, so all of them is found.
    assert found.lower_mean_square == pytest.approx(true.mean_square, abs=5 * found.lower_standard_error)
    assert found.least > 0.5 * math.sqrt(true.mean_square)


def test_an_error_that_corrections_hardly_see_is_bounded_all_the_same(clean):
    """Of twice the image's phase: uncorrelated with the image, and alike for shifted and conjugate ones. Only where the
    exact denoiser removes little does its trace in ``x - D`` show.
    """
    wrong = lambda x, s: EXACT(x, s) + 0.2 * s * math.sqrt(2) * x.sgn().square()  # noqa: E731
    found = bounds(wrong, clean, SIGMA)
    assert summarise(score_error(wrong, EXACT, clean, SIGMA)).mean_square == pytest.approx(0.2**2)
    assert found.lower_mean_square < 0.5 * 0.2**2
    assert found.least < 0.2 < found.most


def test_differences_are_exact_though_neither_error_is_known(clean):
    gain, standard_error = difference(bold, patterned, clean, SIGMA)
    true = summarise(score_error(bold, EXACT, clean, SIGMA)).mean_square - 0.1**2
    assert abs(gain - true) < 5 * standard_error
    assert standard_error < 0.2 * abs(true), "the test must be able to tell"
    assert difference(bold, bold, clean, SIGMA) == (0, 0)


def test_an_images_error_depends_on_its_index_alone(clean):
    assert torch.equal(score_error(bold, EXACT, clean[:40], SIGMA)[:5], score_error(bold, EXACT, clean[:5], SIGMA))
    assert not torch.equal(*(score_error(bold, EXACT, clean[:5], SIGMA, seed) for seed in (0, 1)))
    alike = score_error(bold, EXACT, clean[:1].expand(40, *SHAPE), SIGMA)
    assert len(alike.unique()) == 40, "one image, forty noises"


def test_too_few_images_are_refused(clean):
    with pytest.raises(ValueError, match="3 images"):
        bounds(EXACT, clean[:3], SIGMA)
