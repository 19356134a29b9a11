"""Conformal factors: the promise holds as often as it says, and nothing is promised that the data cannot show."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mri_posterior.conformal import (
    FACTORS,
    ConformalConfig,
    hoeffding_bentkus,
    losses,
    needed_factor,
    require_units,
    scale_interval,
    smallest_factor,
    split_subjects,
    units_needed,
    waudby_smith_ramdas,
)
from mri_posterior.errors import UserError


def test_intervals_are_scaled_about_their_middle_and_stay_magnitudes():
    lower, upper = scale_interval(np.array([1.0, 0.2]), np.array([3.0, 1.0]), 2.0)
    assert lower == pytest.approx([0, 0])
    assert upper == pytest.approx([4, 1.4])
    assert scale_interval(np.array([1.0]), np.array([3.0]), 0.5)[0] == pytest.approx([1.5])


def test_the_needed_factor_is_the_first_that_holds_the_target():
    rng = np.random.default_rng(0)
    target = rng.uniform(0, 3, 500)
    lower = rng.uniform(0, 2, 500)
    upper = lower + rng.uniform(0.1, 1, 500)
    for target_, lower_, upper_, factor in zip(target, lower, upper, needed_factor(target, lower, upper), strict=True):
        for scale, held in ((1 + 1e-9, True), (1 - 1e-6, False)):
            low, high = scale_interval(lower_, upper_, scale * factor)
            assert (low <= target_ <= high) is np.bool_(held)
    assert needed_factor(np.array([1.0, 1.0]), np.array([1.0, 0.5]), np.array([1.0, 0.5])).tolist() == [0, np.inf]


def test_noise_of_the_target_adds_in_square():
    """The middle is missed by 5; a noise margin of 3 leaves 4 to the interval, whose half width is 2."""
    assert needed_factor(np.array([9.0]), np.array([2.0]), np.array([6.0]), 3.0) == pytest.approx([2.0])


def test_losses_are_the_share_of_pixels_not_held():
    shares = losses(np.array([0.1, 1.0, 2.0, np.inf]))
    assert len(shares) == len(FACTORS)
    assert (np.diff(shares) <= 0).all()
    assert shares[0] == 0.75 and shares[-1] == 0.25
    assert shares[np.searchsorted(FACTORS, 1.5)] == 0.5


@pytest.mark.parametrize(("alpha", "delta", "n"), [(0.1, 0.1, 22), (0.05, 0.1, 45), (0.2, 0.1, 11), (0.5, 0.1, 4)])
def test_fewest_units(alpha, delta, n):
    assert units_needed(alpha, delta) == n
    perfect = np.zeros((n, len(FACTORS)))
    config = ConformalConfig(levels=(1 - alpha,), delta=delta, bound="hoeffding_bentkus")
    assert smallest_factor(perfect, config, 1 - alpha) == pytest.approx(FACTORS[0])
    with pytest.raises(UserError, match=f"at least {n} calibration slices, there are {n - 1}"):
        require_units(config, n - 1)
    with pytest.raises(UserError, match=f"at least {n}"):
        smallest_factor(perfect[1:], config, 1 - alpha)


def test_factors_that_cannot_be_shown_are_not_given():
    assert smallest_factor(np.ones((50, len(FACTORS))), ConformalConfig(), 0.9) is None
    # Three of 50 images are lost whatever the factor: Hoeffding's and Bentkus' bounds of 0.06 are above 0.1.
    some = np.repeat((np.arange(50) < 3)[:, None], len(FACTORS), axis=1).astype(float)
    assert smallest_factor(some, ConformalConfig(bound="hoeffding_bentkus"), 0.9) is None


@pytest.mark.parametrize("test", [hoeffding_bentkus, waudby_smith_ramdas])
@pytest.mark.parametrize("law", [stats.bernoulli(0.1), stats.beta(2, 18), stats.beta(0.05, 0.45)])
def test_p_values_of_a_mean_at_the_limit_are_rarely_small(test, law):
    """A valid p-value is below u with probability u at most; 1000 runs, 4 standard errors of a binomial allowed."""
    assert law.mean() == pytest.approx(0.1)
    draws = law.rvs((1000, 40), random_state=np.random.default_rng(1))
    p_values = test(draws.T.astype(float), 0.1)
    for level in (0.01, 0.1, 0.3):
        assert (p_values <= level).mean() <= level + 4 * math.sqrt(level * (1 - level) / len(draws))


def test_betting_sees_what_the_worst_case_bound_cannot():
    values = np.full(40, 0.03) + np.tile([0.02, -0.02], 20)
    assert waudby_smith_ramdas(values, 0.1) < 0.1 < hoeffding_bentkus(values, 0.1)


def image_losses(scales: np.ndarray) -> np.ndarray:
    """Of images whose errors are ``scale`` times those that their 90 % intervals expect; pixels without number."""
    return 2 * stats.norm.sf(stats.norm.ppf(0.95) * FACTORS / scales[:, None])


@pytest.mark.parametrize("bound", ["waudby_smith_ramdas", "hoeffding_bentkus"])
def test_the_promise_is_broken_no_more_often_than_delta(bound, runs=200):
    """Images vary: scales are lognormal. The share of calibration sets whose factor has a risk above alpha is at most
    delta; a binomial count, 4 standard errors allowed. Seeded, so that it passes or fails for good.
    """
    rng = np.random.default_rng(3)
    population = image_losses(np.exp(0.3 * rng.standard_normal(4000)))
    risk = population.mean(axis=0)
    config = ConformalConfig(bound=bound, delta=0.1)
    broken = []
    for _ in range(runs):
        factor = smallest_factor(population[rng.integers(0, len(population), 40)], config, 0.9)
        broken.append(factor is not None and risk[np.searchsorted(FACTORS, factor)] > 0.1)
    assert np.mean(broken) <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / runs)
    # And it is not kept by intervals of any width.
    assert risk[np.searchsorted(FACTORS, factor)] > 0.002


def test_subjects_are_split_without_overlap():
    names = [f"s{i}" for i in range(15)] * 4
    calibration, test = split_subjects(names, 0.5, np.random.default_rng(0))
    assert len(calibration) == 8 and len(test) == 7
    assert not set(calibration) & set(test)
    assert (calibration, test) == split_subjects(names[::-1], 0.5, np.random.default_rng(0))
    assert len(split_subjects(names, 0.001, np.random.default_rng(0))[1]) == 2
    with pytest.raises(UserError, match="3 subjects"):
        split_subjects(["a", "b", "c"], 0.5, np.random.default_rng(0))


@pytest.mark.parametrize("wrong", [{"delta": 0.0}, {"test_share": 1.0}, {"levels": ()}, {"levels": (1.0,)}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="conformal"):
        ConformalConfig(**wrong)
