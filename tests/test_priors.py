"""Denoisers: closed forms against numbers computed another way, and the network's wrapper and storage."""

from __future__ import annotations

import json

import pytest
import torch

from mri_posterior.errors import UserError
from mri_posterior.exact import power_law, white
from mri_posterior.priors import (
    GaussianMixturePrior,
    GaussianPrior,
    NetworkConfig,
    NetworkPrior,
    RingPrior,
    load_prior,
)

SMALL = NetworkConfig(channels=(8, 16), layers=1)


def tweedie_check(prior, log_density, x: torch.Tensor, sigma: float) -> None:
    """``D(x) = x + sigma^2 grad log p_sigma(x)``; autograd's complex gradient of a real function is ``d/da + i
    d/db``.
    """
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(x).sum(), x)
    assert torch.allclose(prior(x.detach(), sigma), x.detach() + sigma**2 * gradient, atol=1e-10)


def test_gaussian_prior(generator):
    spectrum, sigma, mean = power_law((5, 6)), 0.3, 0.2 + 0.1j

    def log_density(x):
        modes = torch.fft.fft2(x - mean, norm="ortho")
        return -(modes.abs().square() / (2 * (spectrum + sigma**2))).sum((-2, -1))

    tweedie_check(GaussianPrior(mean, spectrum=spectrum), log_density, white(generator, 2, 5, 6), sigma)


def test_mixture_prior(generator):
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means, variances, sigma = white(generator, 3, 2, 3), torch.rand(3, 2, 3, dtype=torch.float64) + 0.1, 0.4

    def log_density(x):
        total = variances + sigma**2
        exponents = -((x[:, None] - means).abs().square() / (2 * total) + total.log()).sum((-2, -1))
        return torch.logsumexp(weights.log() + exponents, 1)

    tweedie_check(GaussianMixturePrior(weights, means, variances), log_density, white(generator, 4, 2, 3), sigma)


def test_ring_prior(generator):
    radius, width, sigma = 1.3, 0.2, 0.5

    def log_density(x):
        total = width**2 + sigma**2
        bessel = torch.special.i0e(radius * x.abs() / total).log() + radius * x.abs() / total
        return (-(x.abs().square() + radius**2) / (2 * total) + bessel).sum((-2, -1))

    tweedie_check(RingPrior(radius, width), log_density, white(generator, 4, 1, 2), sigma)


def test_one_sigma_per_image(generator):
    x, sigmas = white(generator, 3, 4, 4), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    for prior in (GaussianPrior(spectrum=power_law((4, 4))), RingPrior()):
        alone = torch.cat([prior(x[i : i + 1], float(s)) for i, s in enumerate(sigmas)])
        assert torch.allclose(prior(x, sigmas), alone)


def network() -> NetworkPrior:
    torch.manual_seed(0)
    return NetworkPrior(SMALL).eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [(16, 16), (15, 18), (3, 5), (1, 7)])
def test_network_takes_any_size(shape, generator):
    x = white(generator, 2, *shape, dtype=torch.complex64)
    denoised = network()(x, 0.1)
    assert denoised.shape == x.shape
    assert denoised.dtype == torch.complex64
    assert torch.isfinite(denoised.abs()).all()


def test_network_images_are_independent_of_the_batch(generator):
    x, prior = white(generator, 3, 16, 12, dtype=torch.complex64), network()
    alone = torch.cat([prior(image[None], 0.2) for image in x])
    # float32 sums in another order: 1e-6 relative, times the depth of the network.
    assert torch.allclose(prior(x, 0.2), alone, atol=1e-5)


def test_network_trusts_nearly_clean_images(generator):
    x = white(generator, 1, 16, 16, dtype=torch.complex64)
    # c_out = sigma to first order, so the correction is of the size of the noise.
    assert float((network()(x, 1e-4) - x).abs().max()) < 1e-2


def test_save_and_load_keep_the_denoiser(tmp_path, generator):
    prior = network()
    prior.save(tmp_path / "prior", "# card")
    loaded = load_prior(tmp_path / "prior")
    assert loaded.config == prior.config
    assert sorted(p.name for p in (tmp_path / "prior").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    x = white(generator, 1, 16, 16, dtype=torch.complex64)
    # Half precision keeps 11 bits: 5e-4 relative per weight, of random sign, on outputs of size sigma.
    assert torch.allclose(loaded(x, 0.1), prior(x, 0.1), atol=2e-3 * 0.1 * 5)


def test_weights_of_another_network_are_refused(tmp_path):
    network().save(tmp_path, "")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"channels": [8, 24]}))
    with pytest.raises(UserError, match="does not fit its config"):
        load_prior(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", "{"), ("config.json", '{"colour": 1}'), ("model.safetensors", "x")]
)
def test_broken_directories_are_refused(tmp_path, name, content):
    network().save(tmp_path, "")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_prior(tmp_path)


def test_unknown_prior_lists_the_shipped_ones():
    with pytest.raises(UserError, match="brain_t1_2mm"):
        load_prior("brain_t1_3mm")


@pytest.mark.parametrize(("name", "shape"), [("brain_t1_2mm", (120, 96)), ("knee_phantom_1mm", (128, 128))])
def test_shipped_priors_denoise(name, shape):
    """At every noise level a shipped prior must beat the best linear shrinkage of each pixel, on images it never
    saw.
    """
    from mri_posterior.training_data import KneePhantoms

    prior = load_prior(name)
    generator = torch.Generator().manual_seed(3)
    if name.startswith("knee"):
        clean = KneePhantoms().batch(("test",), 2, shape, held_out=True)
    else:
        pytest.importorskip("nilearn", reason="the brain template comes with nilearn")
        from mri_posterior.phantoms import brain_slices

        clean = torch.from_numpy(brain_slices(shape, [10.0, 40.0])).to(torch.complex64)
    for sigma in (0.02, 0.1, 0.5):
        noisy = clean + sigma * white(generator, *clean.shape, dtype=torch.complex64)
        error = float((prior(noisy, sigma) - clean).abs().square().mean() / 2)
        power = float(clean.abs().square().mean() / 2)
        assert error < 0.7 * power * sigma**2 / (power + sigma**2)
