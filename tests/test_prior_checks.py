"""The checks of a prior, checked where the answer is known; and the command that runs them."""

from __future__ import annotations

import math
from itertools import pairwise

import h5py
import numpy as np
import pytest
import torch

from benchmarks import denoising, prior_checks, unconditional
from benchmarks.denoising import CLASSICAL, Level, apply, compare, psnr
from benchmarks.prior_checks import frechet_table, gaussian_twin, main, nearest, ratio_interval
from mri_posterior import cli
from mri_posterior.errors import UserError
from mri_posterior.exact import power_law, white
from mri_posterior.priors import GaussianPrior, NetworkConfig, NetworkPrior
from mri_posterior.samplers.schedules import diffusion_levels
from mri_posterior.training_data import MagnitudeSlices

SHAPE = (16, 16)
SIGMA_MIN = 0.02


@pytest.fixture
def dataset(tmp_path):
    """Forty discs of five subjects' radii, the last two subjects held out; smooth enough to be told apart coarsely."""
    rows, columns = np.mgrid[:32, :24]
    images = np.zeros((40, 32, 24), np.uint8)
    generator = np.random.default_rng(0)
    for i in range(40):
        inside = np.hypot(rows - 16, columns - 12) < 7 + i // 8
        images[i] = inside * (150 + 50 * np.sin(rows * generator.normal() / 2 + columns * generator.normal() / 2))
    path = tmp_path / "images.h5"
    with h5py.File(path, "w") as file:
        file["images"] = images
        file["subject_index"] = np.repeat(np.arange(5), 8)
        file["split"] = np.array([b"train"] * 3 + [b"val"] * 2)
    return path


def corrected_variance(spectrum: torch.Tensor, sampler: unconditional.PredictorCorrector) -> torch.Tensor:
    """Variance of every mode of a Gaussian prior at the end: all steps are linear, so moments obey recursions.

    Predictor ``x' = (k + (1 - k) g) x + b sqrt(1 - k) n``; corrector ``x' = m x + b sqrt(2h) n``.
    """
    levels = diffusion_levels(sampler.sigma_max, sampler.sigma_min, sampler.steps)
    variance = torch.full_like(spectrum, sampler.sigma_max**2)
    for a, b in pairwise(levels):
        keep, gain = (b / a) ** 2, spectrum / (spectrum + a**2)
        variance = (keep + (1 - keep) * gain) ** 2 * variance + b**2 * (1 - keep)
        pull = 1 - sampler.h * (1 - spectrum / (spectrum + b**2))
        for _ in range(sampler.corrections):
            variance = pull**2 * variance + 2 * sampler.h * b**2
    return variance


def test_predictor_corrector_has_the_law_of_its_linear_recursion():
    spectrum = power_law(SHAPE).float()
    sampler = unconditional.PredictorCorrector(sigma_min=SIGMA_MIN, steps=10)
    draws = unconditional.draw(GaussianPrior(spectrum=spectrum), sampler, 64, SHAPE, batch=64)
    power = torch.fft.fft2(draws, norm="ortho").abs().square() / 2
    whitened = float((power / corrected_variance(spectrum, sampler)).mean())
    # A mean of 64 * 256 chi-squared variables of two degrees, halved: standard deviation 1/sqrt(64 * 256).
    assert whitened == pytest.approx(1, abs=5 / math.sqrt(64 * 256))


def test_corrections_bring_the_law_nearer_to_the_prior():
    """By the same recursion, without Monte-Carlo error: no mode is further off than 5 %, nor than without them."""
    spectrum = power_law(SHAPE).double()
    none, two = (unconditional.PredictorCorrector(sigma_min=SIGMA_MIN, corrections=c) for c in (0, 2))
    exact = spectrum + SIGMA_MIN**2
    worst = [float((corrected_variance(spectrum, s) / exact - 1).abs().max()) for s in (none, two)]
    assert worst[1] < 0.05 < worst[0]


def test_probability_flow_is_heuns_method():
    """On a Gaussian prior every mode is multiplied by a number; the exact flow's is ``sqrt((S + b^2)/(S + a^2))``."""
    spectrum = power_law(SHAPE).float()
    factors = []
    for steps in (100, 200):
        sampler = unconditional.ProbabilityFlow(sigma_min=SIGMA_MIN, steps=steps)
        draws = unconditional.draw(GaussianPrior(spectrum=spectrum), sampler, 1, SHAPE)
        plain = unconditional.draw(lambda x, sigma: x, sampler, 1, SHAPE)  # a denoiser that moves nothing: the start
        factors.append((torch.fft.fft2(draws) / torch.fft.fft2(plain)).real)
    exact = ((spectrum + SIGMA_MIN**2) / (spectrum + 100)).sqrt()
    errors = [float((f / exact - 1).abs().max()) for f in factors]
    assert errors[1] < 0.01
    # Second order: half the step, a quarter of the error, give or take the next order.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


def test_draws_do_not_depend_on_their_batch_and_cost_what_they_say():
    prior = GaussianPrior(spectrum=power_law(SHAPE).float())
    for sampler in unconditional.ways(SIGMA_MIN, 12).values():
        together, apart = (unconditional.draw(prior, sampler, 3, SHAPE, batch=b) for b in (3, 2))
        assert torch.allclose(together, apart, atol=1e-6)
        calls = []
        counted = lambda x, sigma, calls=calls: calls.append(sigma) or prior(x, sigma)  # noqa: E731
        unconditional.draw(counted, sampler, 1, SHAPE)
        assert len(calls) == 12


def test_psnr_is_per_real_channel():
    clean = torch.zeros(2, 4, 4, dtype=torch.complex64)
    error = torch.stack([torch.full((4, 4), 0.1 + 0.1j), torch.full((4, 4), 0.01 - 0.01j)])
    assert psnr(clean, error).tolist() == pytest.approx([20, 40], abs=1e-4)


@pytest.mark.parametrize("name", sorted(CLASSICAL))
def test_classical_denoisers_denoise(name, generator):
    """A disc at a tenth of its brightness: every method gains 3 dB at least, at its own best strength."""
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(40), indexing="ij")
    clean = (torch.hypot(rows - 24.0, columns - 20.0) < 14) * (0.8 + 0.6j)
    clean = clean[None].to(torch.complex64)
    noisy = clean + 0.1 * white(generator, *clean.shape, dtype=clean.dtype)
    method, grid = CLASSICAL[name]
    best = max(float(psnr(clean, apply(method, noisy, 0.1, s))) for s in grid)
    assert best > float(psnr(clean, noisy)) + 3
    assert float(psnr(clean, noisy)) == pytest.approx(20, abs=5 * 20 / math.log(10) / math.sqrt(2 * 2 * 48 * 40))


def test_the_exact_denoiser_has_its_known_error_and_beats_the_rest():
    """A Gaussian prior's least error is ``mean of S sigma^2/(S + sigma^2)`` per channel."""
    spectrum, sigma, n = power_law((32, 32)).float(), 0.1, 6
    clean = gaussian_draws(spectrum, n)
    level = compare(GaussianPrior(spectrum=spectrum), clean, sigma)
    least = float((spectrum * sigma**2 / (spectrum + sigma**2)).mean())
    # n * 1024 modes of two channels; a mean of squares whose weights differ has at most the error of its largest
    # weights, sigma^2, alone: here relative error below 5 % at 5 standard deviations, 0.22 dB.
    mean = float((10 ** (-level.psnr["prior"] / 10)).mean())
    share = (spectrum * sigma**2 / (spectrum + sigma**2)).square().mean().sqrt() / least
    assert mean == pytest.approx(least, rel=5 * float(share) / math.sqrt(n * 1024))
    assert float(level.gain.min()) > 0


def gaussian_draws(spectrum: torch.Tensor, n: int) -> torch.Tensor:
    noise = white(torch.Generator().manual_seed(7), n, *spectrum.shape, dtype=torch.complex64)
    return torch.fft.ifft2(spectrum.sqrt() * torch.fft.fft2(noise))


def test_gain_is_over_the_best_classical_method():
    scores = {"prior": [30.0, 31.0], "TV": [29.0, 28.0], "wavelet": [20.0, 32.0]}
    level = Level(0.1, {k: torch.tensor(v) for k, v in scores.items()}, {})
    assert level.gain.tolist() == [1.0, 3.0]


@pytest.mark.parametrize(("mirrored", "shift"), [(False, (0, 0)), (True, (3, -5)), (False, (-8, 8)), (True, (-6, 1))])
def test_a_memorised_slice_is_found(dataset, mirrored, shift):
    """However it is shifted, mirrored and scaled; and new subjects' slices are not at distance 0."""
    data = MagnitudeSlices(dataset)
    training = data.slices()
    copy = prior_checks._frame(training[5], (48, 40))
    copy = (copy.flip(-1) if mirrored else copy).roll(shift, (0, 1)) * 0.7
    found = nearest(copy[None], training)
    # Rounding of unit images in single precision.
    assert float(found.distance[0]) < 1e-5
    assert int(found.index[0]) == 5
    assert torch.allclose(found.images[0] * 0.7, copy)
    held_out = nearest(prior_checks._frame(data.slices(held_out=True)[:3], (48, 40)), training)
    assert float(held_out.distance.min()) > 0.05


def test_distance_is_the_sine_of_the_angle():
    """One pixel on, and a second of the same brightness: 45 degrees."""
    a, b = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    a[0, 4:12, 4:8] = b[0, 4:12, 4:12] = 1
    assert float(nearest(b, a).distance[0]) == pytest.approx(math.sqrt(0.5), abs=1e-6)


def test_the_gaussian_twin_has_mean_and_spectrum(generator):
    spectrum = power_law(SHAPE)
    images = 0.5 + torch.fft.ifft2(spectrum.sqrt() * torch.fft.fft2(white(generator, 400, *SHAPE)))
    twin = gaussian_twin(images, 400, generator)
    power = [torch.fft.fft2(x - x.mean(0), norm="ortho").abs().square().sum(0) for x in (images, twin)]
    # 400 draws per mode: relative error 1/20; the mean of 256 log ratios is 16 times better known, times sqrt(1/2).
    ratio = float((power[1] / power[0]).log().mean())
    assert abs(ratio) < 5 / 20 / 16
    assert float((twin.mean(0) - images.mean(0)).abs().max()) < 5 * math.sqrt(2 * float(spectrum.mean()) / 400)


def test_frechet_rows_tell_wrong_from_right(dataset):
    data = MagnitudeSlices(dataset)
    right = data.batch(("right",), 8, (32, 24), held_out=True)
    noise = 0.05 * white(torch.Generator().manual_seed(0), 8, 32, 24, dtype=right.dtype)
    text = frechet_table({"right": right + 0.4 * noise, "dim": 0.5 * right + 0.4 * noise}, data, 0.02, 5)
    distance = {line.split("|")[1].strip(): float(line.split("|")[2].split("±")[0]) for line in text.splitlines()[2:]}
    assert distance["samples, dim"] > 2 * distance["samples, right"]
    assert distance["Gaussian of the training images' spectrum"] > distance["held-out images"]


def test_bootstrap_interval_holds_the_ratio_of_medians():
    """Ten thousand normal draws about 3 and 2: the median's relative error is 1.25/100/2, so 1.5 to within 2 %."""
    generator = torch.Generator().manual_seed(0)
    a, b = 3 + torch.randn(10_000, generator=generator), 2 + torch.randn(10_000, generator=generator)
    ratio, low, high = ratio_interval(a, b, generator, repeats=200)
    assert low < ratio < high
    # d(log ratio) has variance (0.0125/3)^2 + (0.0125/2)^2 = 0.0075^2: the interval is 4 x 0.0075 x 1.5 wide.
    assert high - low == pytest.approx(4 * 0.0075 * 1.5, rel=0.4)
    assert ratio == pytest.approx(1.5, rel=5 * 0.0075)


def test_the_command_writes_page_and_pictures(dataset, tmp_path, monkeypatch, capsys):
    NetworkPrior(NetworkConfig(channels=(8, 8))).save(tmp_path / "prior", "card")
    monkeypatch.setattr(prior_checks, "SHAPE", (32, 24))
    monkeypatch.setattr(prior_checks, "ROOT", tmp_path)
    monkeypatch.setattr(denoising, "SIGMAS", (0.1,))
    page = tmp_path / "docs" / "prior_checks.md"
    page.parent.mkdir()
    page.write_text("<!-- prior checks -->\n<!-- /prior checks -->\n")
    options = ["--prior", str(tmp_path / "prior"), "--input", str(dataset), "--quick"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "Nearest training slice" in printed
    assert page.read_text().count("\n") == 2, "nothing is written unasked"
    assert main([*options, "--write"]) == 0
    assert capsys.readouterr().out == printed, "the same seed, the same figures"
    assert printed.strip() in page.read_text()
    pictures = sorted(path.name for path in (tmp_path / "docs" / "figures").iterdir())
    assert pictures == ["prior_nearest.png", "prior_samples.png"]


def test_users_mistakes_are_one_line(dataset, capsys):
    assert cli.run(main, ["--samples", "8"]) == 2
    assert "--input" in capsys.readouterr().err
    with pytest.raises(UserError, match="at least 4"):
        main(["--input", str(dataset), "--samples", "2"])
