from __future__ import annotations

from argparse import Namespace

import h5py
import numpy as np
import pytest

from mri_posterior.errors import UserError
from mri_posterior.metrics import (
    coverage,
    credible_interval,
    crps,
    foreground_mask,
    image_metrics,
    interval_coverage,
    square_crop,
)


@pytest.fixture
def volumes():
    random = np.random.default_rng(0)
    targets = [random.uniform(0, 1e-4, (3, 24, 16)).astype(np.float32) for _ in range(2)]
    return [(t, (t + random.normal(0, 1e-5, t.shape)).astype(np.float32)) for t in targets]


def test_metrics_are_those_of_fastmri_evaluate_on_the_same_folders(volumes, tmp_path):
    from fastmri.evaluate import evaluate

    for folder in ("target", "output"):
        (tmp_path / folder).mkdir()
    for i, (target, reconstruction) in enumerate(volumes):
        with h5py.File(tmp_path / "target" / f"{i}.h5", "w") as file:
            file["reconstruction_rss"] = target
        with h5py.File(tmp_path / "output" / f"{i}.h5", "w") as file:
            file["reconstruction"] = reconstruction
    arguments = Namespace(
        target_path=tmp_path / "target", predictions_path=tmp_path / "output", acquisition=None, acceleration=None
    )
    theirs = evaluate(arguments, "reconstruction_rss").means()

    ours = [image_metrics(square_crop(target), square_crop(reconstruction)) for target, reconstruction in volumes]

    for name in ("NMSE", "PSNR", "SSIM"):
        assert np.mean([metrics[name] for metrics in ours]) == pytest.approx(float(np.squeeze(theirs[name])), rel=1e-12)
    assert all(type(value) is float for value in ours[0].values())


def test_metrics_of_known_errors():
    target = np.random.default_rng(0).uniform(size=(2, 16, 16))
    metrics = image_metrics(target, target + 0.1 * target.max())
    assert metrics["PSNR"] == pytest.approx(20)  # an error of a tenth of the peak everywhere
    assert image_metrics(target, 1.1 * target)["NMSE"] == pytest.approx(0.01)
    assert image_metrics(target, target * (1 + 1e-9))["SSIM"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, r: (t, r[:, 1:]), "one shape"),
        (lambda t, r: (t[0], r[0]), "slice, h, w"),
        (lambda t, r: (t, r * 1j), "complex"),
        (lambda t, r: (t, np.where(r == r.max(), np.nan, r)), "NaN"),
        (lambda t, r: (0 * t, r), "zero everywhere"),
        (lambda t, r: (t[:, :5], r[:, :5]), "7 x 7"),
    ],
)
def test_volumes_that_cannot_be_compared_are_refused(volumes, spoil, message):
    with pytest.raises(UserError, match=message):
        image_metrics(*spoil(*volumes[0]))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (17, 12)])
def test_square_crop_is_fastmris_where_fastmri_can(shape):
    from fastmri.data.transforms import center_crop

    volume = np.arange(np.prod(shape)).reshape(1, *shape)
    side = min(shape)
    np.testing.assert_array_equal(square_crop(volume), center_crop(volume, (side, side)))


DRAWS = 40_000


def _share_inside(samples, truth, level):
    lower, upper = credible_interval(samples, level)
    return ((lower <= truth) & (truth <= upper)).mean()


def _tolerance(level):
    """Four standard deviations of a binomial share: one false alarm in 16,000."""
    return 4 * np.sqrt(level * (1 - level) / DRAWS)


@pytest.mark.parametrize("n", [2, 8, 40])
@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_whole_ranks_cover_exactly_whatever_the_distribution(n, draw):
    random = np.random.default_rng(n)
    samples, truth = getattr(random, draw)(size=(n, DRAWS)), getattr(random, draw)(size=DRAWS)
    for rank in {1, max(n // 4, 1)}:
        level = 1 - 2 * rank / (n + 1)  # rank 1 is the samples' range: 7/9 for 8 of them
        assert _share_inside(samples, truth, level) == pytest.approx(level, abs=_tolerance(level))


@pytest.mark.parametrize("n", [2, 8, 40])
def test_beyond_the_range_normal_draws_are_covered_exactly(n):
    random = np.random.default_rng(n)
    samples, truth = 5 + 2 * random.normal(size=(n, DRAWS)), 5 + 2 * random.normal(size=DRAWS)
    for level in (0.96, 0.99):
        assert _share_inside(samples, truth, level) == pytest.approx(level, abs=_tolerance(level))


@pytest.mark.parametrize("n", [8, 40])
def test_levels_between_ranks_lie_between_the_ranks_coverage(n):
    random = np.random.default_rng(n)
    samples, truth = random.normal(size=(n, DRAWS)), random.normal(size=DRAWS)
    for level in (0.5, 0.6, 0.7):
        rank = (n + 1) * (1 - level) / 2
        inner, outer = (1 - 2 * r / (n + 1) for r in (np.floor(rank) + 1, np.floor(rank)))
        share = _share_inside(samples, truth, level)
        assert inner - _tolerance(level) < share < outer + _tolerance(level)
        # Linear interpolation between ranks is generous for light tails: 0.025 too much at 8 samples and level 0.7.
        assert -_tolerance(level) < share - level < 0.03


def test_the_samples_own_quantiles_would_not_do():
    random = np.random.default_rng(0)
    samples, truth = random.normal(size=(8, DRAWS)), random.normal(size=DRAWS)
    naive = np.quantile(samples, [0.05, 0.95], axis=0)
    assert ((naive[0] <= truth) & (truth <= naive[1])).mean() < 0.75
    assert _share_inside(samples, truth, 0.9) > 0.89


def test_interval_keeps_shape_type_and_sign():
    samples = np.random.default_rng(0).uniform(0, 1, (4, 2, 3, 5)).astype(np.float32)
    lower, upper = credible_interval(samples, 0.99, nonnegative=True)
    assert lower.shape == upper.shape == (2, 3, 5)
    assert lower.dtype == upper.dtype == np.float32
    assert lower.min() == 0
    assert credible_interval(samples, 0.99)[0].min() < 0


@pytest.mark.parametrize(("n", "level"), [(1, 0.9), (8, 0.0), (8, 1.0), (8, 90)])
def test_bad_interval_requests_are_refused(n, level):
    with pytest.raises(UserError):
        credible_interval(np.ones((n, 3)), level)


def test_coverage_counts_foreground_apart():
    target = np.array([[1.0, 1.0, 0.01, 0.0]])
    result = coverage(target, np.array([[0.9, 1.1, 0.1, 0.1]]), np.array([[1.1, 1.2, 0.2, 0.2]]))
    assert result == (0.25, 0.5)
    np.testing.assert_array_equal(foreground_mask(target), [[True, True, False, False]])
    assert coverage(target, target, target, foreground=0.0) == (1.0, 1.0)
    with pytest.raises(UserError, match="pixels"):
        coverage(target, target[:, 1:], target)


@pytest.mark.parametrize("n", [8, 40])
def test_noise_of_the_reference_is_allowed_for(n):
    random = np.random.default_rng(n)
    samples, clean = 10 + random.normal(size=(n, DRAWS)), 10 + random.normal(size=DRAWS)
    noisy = clean + 0.8 * random.normal(size=DRAWS)
    honest = interval_coverage(noisy, samples, extra_std=0.8)
    for level, share in honest.items():
        assert level - _tolerance(level) < share.all < level + 0.02 + _tolerance(level)
        assert share.all == share.foreground  # there is no air in this image
        # The intervals of the clean image fall short of the noisy one.
        assert interval_coverage(noisy, samples, [level])[level].all < level - 0.03
        assert interval_coverage(clean, samples, [level])[level].all == pytest.approx(level, abs=0.02)


def test_noise_may_differ_from_pixel_to_pixel_and_spread_may_vanish():
    samples, std = np.ones((8, 2, 3)), np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    target = 1 + 1.9 * std
    assert interval_coverage(target, samples, [0.95], extra_std=std)[0.95] == (1.0, 1.0)
    assert interval_coverage(target, samples, [0.9], extra_std=std)[0.9] == (0.0, 0.0)


def test_crps_by_hand_and_of_one_value():
    """Samples 0, 1, 3 and the truth 2: mean distance (2 + 1 + 1)/3; pairs 1, 3, 2 apart, over 3 x 2."""
    samples = np.array([3.0, 0.0, 1.0])[:, None]
    score, expected = crps(np.array([2.0]), samples)
    assert expected == pytest.approx([6 / 6])
    assert score == pytest.approx([4 / 3 - 1])
    assert crps(np.array([2.0]), np.full((5, 1), 4.5))[0] == pytest.approx([2.5])


@pytest.mark.parametrize("n_samples", [2, 8])
def test_crps_is_unbiased_whatever_the_number_of_samples(n_samples):
    """Of N(0, 1) for a truth of N(0, 1) it is ``1/sqrt(pi)``; 20,000 draws, 4 standard errors."""
    draws = np.random.default_rng(0).standard_normal((n_samples + 1, 20000))
    for values in crps(draws[0], draws[1:]):
        assert values.mean() == pytest.approx(1 / np.sqrt(np.pi), abs=4 * values.std() / np.sqrt(20000))


@pytest.mark.parametrize("shape", [(1, 3), (4, 2)])
def test_crps_refuses_what_it_cannot_score(shape):
    with pytest.raises(UserError, match="two samples"):
        crps(np.zeros(3), np.zeros(shape))
