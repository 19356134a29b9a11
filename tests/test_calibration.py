"""Calibration tests against closed forms, and against samplers that are wrong in known ways.

The model is ``x ~ N(0, 1)`` measured with noise of level 1, for each of `k` functionals: the posterior is
``N(y/2, 1/2)``.

False alarms. All draws are seeded, so a test passes or fails for good. Before the seed was chosen a right sampler had,
with the thresholds below, a chance of at most 0.01 per p-value and 6e-5 per z-score (4 standard errors) to be rejected.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mri_posterior.calibration import (
    averaging_gain,
    holm,
    interval_coverage_from_ranks,
    rank_test,
    sbc_ranks,
    spread_skill,
    tarp,
    uniformity,
)

N, M, K = 400, 31, 3
WRONG = {
    "over-dispersed": lambda mean, noise, rng: mean + 1.4 * noise,
    "under-dispersed": lambda mean, noise, rng: mean + 0.7 * noise,
    "biased": lambda mean, noise, rng: mean + 0.3 + noise,
    # All samples of a replicate are one draw, as from chains that never moved: their order is that of their jitter.
    "stuck": lambda mean, noise, rng: mean + noise[:, :1] + 1e-3 * noise,
    # The prior itself: right on average over measurements, so that only what depends on the measurement can tell.
    "blind": lambda mean, noise, rng: math.sqrt(2) * noise,
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def draw(rng, wrong=None, n=N):
    """Truths ``[n, k]``, samples ``[n, M, k]`` and measurements."""
    truth = rng.standard_normal((n, K))
    data = truth + rng.standard_normal((n, K))
    mean, noise = data[:, None] / 2, math.sqrt(0.5) * rng.standard_normal((n, M, K))
    samples = mean + noise if wrong is None else WRONG[wrong](mean, noise, rng)
    return truth, samples, data


def log_likelihood(x, data):
    """A functional of the measurement: `x` is ``[n, M, k]`` or ``[n, k]``."""
    data = data if x.ndim == 2 else data[:, None]
    return -((x - data) ** 2).sum(axis=-1, keepdims=True)


def with_likelihood(truth, samples, data):
    return tuple(np.concatenate([x, log_likelihood(x, data)], axis=-1) for x in (truth, samples))


def test_right_samples_pass_every_test(rng):
    truth, samples, data = draw(rng)
    assert rank_test(*with_likelihood(truth, samples, data), rng).p_value > 0.01
    assert tarp(truth, samples, data + rng.standard_normal(data.shape), rng).p_value > 0.01
    coverage = interval_coverage_from_ranks(sbc_ranks(truth, samples, rng), M)
    assert (coverage.p_values > 0.01 / coverage.p_values.size).all()
    assert abs(spread_skill(truth, samples).z) < 4
    assert abs(averaging_gain(truth, samples).z) < 4


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_samples_are_rejected(rng, wrong):
    truth, samples, data = draw(rng, wrong)
    assert rank_test(*with_likelihood(truth, samples, data), rng).p_value < 1e-4
    # References to one side: around the posterior, a constant bias moves truths away as often as towards them.
    references = data + 0.5 + 0.3 * rng.standard_normal(data.shape)
    assert tarp(truth, samples, references, rng).p_value < 1e-4


@pytest.mark.parametrize(("wrong", "sign"), [("over-dispersed", 1), ("under-dispersed", -1), ("stuck", -1)])
def test_spread_skill_and_averaging_gain_tell_the_direction(rng, wrong, sign):
    truth, samples, _ = draw(rng, wrong)
    assert sign * spread_skill(truth, samples).z > 4
    assert sign * averaging_gain(truth, samples).z > 4


def test_samples_that_ignore_the_measurement_pass_without_a_functional_of_it(rng):
    """Why data-dependent functionals and references are asked for."""
    truth, samples, data = draw(rng, "blind")
    assert rank_test(truth, samples, rng).p_value > 0.01
    assert tarp(truth, samples, rng.standard_normal(data.shape), rng).p_value > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_false_alarms_are_as_rare_as_p_values_say(seed):
    """Of 300 independent runs with right samples, a share `alpha` has a p-value below alpha.

    Counts are binomial: 5 standard deviations allowed. The chi-squared law is asymptotic: with 25 replicates per bin
    its tail at 0.05 is off by less than 0.005, and a Holm-adjusted minimum can only be rarer than alpha.
    """
    rng = np.random.default_rng(seed)
    runs, alpha, n = 300, 0.05, 200
    single, together, joint = [], [], []
    for _ in range(runs):
        truth, samples, data = draw(rng, n=n)
        result = rank_test(truth, samples, rng)
        single.append(result.p_values[0])
        together.append(result.p_value)
        joint.append(tarp(truth, samples, data, rng).p_value)
    error = 5 * math.sqrt(alpha * (1 - alpha) / runs)
    assert np.mean(np.array(single) < alpha) == pytest.approx(alpha, abs=error + 0.005)
    assert np.mean(np.array(together) < alpha) < alpha + error + 0.005
    assert np.mean(np.array(joint) < alpha) == pytest.approx(alpha, abs=error)


def test_ranks_count_the_samples_below_and_break_ties_evenly(rng):
    truth, samples = np.array([[2.5], [0.0]]), np.array([[[1.0], [2.0], [3.0]], [[1.0], [2.0], [3.0]]])
    assert sbc_ranks(truth, samples, rng).tolist() == [[2], [0]]
    constant = sbc_ranks(np.zeros((8000, 1)), np.zeros((8000, 7, 1)), rng)
    # Each of 8 ranks is binomial with mean 1000, standard deviation 29.6.
    assert np.bincount(constant[:, 0], minlength=8) == pytest.approx(1000, abs=5 * 29.6)


def test_chi_squared_of_known_counts():
    """8 ranks in 2 bins, 6 replicates in one and 14 in the other: statistic (4^2 + 4^2)/10, one degree of freedom."""
    ranks = np.array([[1]] * 6 + [[5]] * 14)
    assert uniformity(ranks, 7, bins=2)[0] == pytest.approx(stats.chi2.sf(3.2, 1))
    assert uniformity(np.tile(np.arange(32), 2)[:, None], 31, bins=8)[0] == 1, "every rank equally often"


def test_holm_of_known_p_values():
    """Holm's steps by hand: 4 x 0.01, 3 x 0.015 = 0.045, 2 x 0.03 = 0.06, and 0.03's successor no less than that."""
    assert holm(np.array([0.03, 0.01, 0.05, 0.015])) == pytest.approx([0.06, 0.04, 0.06, 0.045])


def test_tarp_curve_of_known_shares(rng):
    """Truths farther from the reference than any sample: all mass at full credibility, none before."""
    curve = tarp(np.full((50, 2), 5.0), rng.uniform(0, 1, (50, 3, 2)), np.zeros((50, 2)), rng)
    assert curve.credibility == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert curve.coverage == pytest.approx([0, 0, 0, 0, 1])


def test_tarp_of_right_samples_is_on_the_diagonal(rng):
    truth, samples, data = draw(rng, n=4000)
    curve = tarp(truth, samples, data, rng)
    # Kolmogorov: the largest deviation exceeds 2.2 / sqrt(n) with probability 2 exp(-2 * 2.2^2) = 1e-4.
    assert np.abs(curve.coverage - curve.credibility).max() < 2.2 / math.sqrt(4000)


def test_interval_coverage_takes_the_nearest_exact_level():
    """19 samples: 10 of 20 ranks are inside the interval from the 5th smallest to the 5th largest, exactly."""
    ranks = np.arange(20)[:, None]
    coverage = interval_coverage_from_ranks(ranks, 19, (0.5, 0.88))
    assert coverage.levels == pytest.approx([0.5, 0.9])
    assert coverage.coverage[:, 0] == pytest.approx([0.5, 0.9])
    assert coverage.standard_error == pytest.approx([math.sqrt(0.25 / 20), math.sqrt(0.09 / 20)])
    assert coverage.p_values[0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("n_samples", [2, 8])
def test_figures_of_complex_images_are_unbiased(rng, n_samples):
    """Posterior variance 1 per real channel: ``V/B = 1`` and gain ``2M/(M + 1)`` whatever the number of samples."""
    shape = (500, 1 + n_samples, 4, 5)
    both = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    ratio, gain = spread_skill(both[:, 0], both[:, 1:]), averaging_gain(both[:, 0], both[:, 1:])
    assert ratio.expected == 1
    assert gain.expected == pytest.approx(10 * math.log10(2 * n_samples / (n_samples + 1)))
    for estimate in (ratio, gain):
        assert abs(estimate.z) < 4
        # V and B are means over 500 * 40 normals: both relative errors are near sqrt(2 / 20000), a hundredth.
        assert 0.002 < estimate.standard_error < 0.2


def test_figures_by_hand():
    """Samples 0 and 2, truth 4: V = 2, the mean misses by 9, so B = 9 - 1; one sample misses by (16 + 4)/2 = 10."""
    truth, samples = np.array([4.0, 4.0]), np.array([[0.0, 2.0], [0.0, 2.0]])
    assert spread_skill(truth, samples).value == pytest.approx(2 / 8)
    assert averaging_gain(truth, samples).value == pytest.approx(10 * math.log10(10 / 9))


def test_standard_errors_are_those_seen_over_repetitions(rng):
    runs = [spread_skill(*draw(rng, n=100)[:2]) for _ in range(200)]
    # The standard deviation of 200 values is known to 5 %: four times that allowed.
    expected = float(np.mean([run.standard_error for run in runs]))
    assert np.std([run.value for run in runs]) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda rng: sbc_ranks(np.zeros((4, 2)), np.zeros((4, 3, 1)), rng), "expected"),
        (lambda rng: sbc_ranks(np.full((4, 1), np.nan), np.zeros((4, 3, 1)), rng), "NaN"),
        (lambda rng: rank_test(np.zeros((80, 1)), np.zeros((80, 30, 1)), rng), "divisor"),
        (lambda rng: rank_test(np.zeros((20, 1)), np.zeros((20, 31, 1)), rng), "too few"),
        (lambda rng: tarp(np.zeros((4, 2)), np.zeros((4, 3, 2)), np.zeros((4, 1)), rng), "references"),
        (lambda rng: interval_coverage_from_ranks(np.zeros((4, 1), int), 7, (0.95,)), "order statistics"),
        (lambda rng: spread_skill(np.zeros(4), np.zeros((4, 1))), "at least 2"),
    ],
)
def test_what_cannot_be_tested_is_refused(rng, call, match):
    with pytest.raises(ValueError, match=match):
        call(rng)
