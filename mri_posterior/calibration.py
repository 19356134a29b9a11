"""Are posterior samples distributed as they claim to be?

Everything here needs replicates: a truth drawn from the prior, a measurement of it, and samples given that measurement.
If the sampler is right, the truth is one further draw, exchangeable with its samples, whatever prior and measurement
are; every test below is of that. The truth must come from the very prior of the target (smoothed by its
``sigma_min``), or a wrong prior is mistaken for a wrong sampler.

Arrays are NumPy's, real unless said otherwise: `truth` is ``[replicates, k]``, `samples` ``[replicates, M, k]``, of `k`
scalar functionals. A functional may depend on the measurement, such as the likelihood does: those are the ones that see
a sampler which ignores its data (Modrák et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from mri_posterior.dispersion import (
    ErrorSums,
    Estimate,
    averaging_gain,
    check_replicates,
    error_sums,
    faults,
    group_sums,
    ratio,
    spread_skill,
)

__all__ = [
    "CoverageCurve",
    "ErrorSums",
    "Estimate",
    "IntervalCoverage",
    "RankTest",
    "averaging_gain",
    "error_sums",
    "faults",
    "group_sums",
    "holm",
    "interval_coverage_from_ranks",
    "rank_test",
    "ratio",
    "sbc_ranks",
    "spread_skill",
    "tarp",
    "uniformity",
]


@dataclass(frozen=True)
class RankTest:
    """Simulation-based calibration of several functionals.

    Attributes
    ----------
    ranks: of the truth among its samples, 0 to M.
    p_values: of uniform ranks, one per functional.
    p_value: of all functionals together (Holm's smallest adjusted value): rejecting below alpha has a false-alarm
        rate of at most alpha, however the functionals depend on one another.
    """

    ranks: Int[np.ndarray, "replicates k"]
    p_values: Float[np.ndarray, " k"]
    p_value: float


@dataclass(frozen=True)
class CoverageCurve:
    """Expected coverage against credibility (TARP).

    Attributes
    ----------
    credibility, coverage: the curve; a right sampler's lies on the diagonal.
    p_value: of the Kolmogorov-Smirnov test of that.
    """

    credibility: Float[np.ndarray, " levels"]
    coverage: Float[np.ndarray, " levels"]
    p_value: float


@dataclass(frozen=True)
class IntervalCoverage:
    """How often central intervals held the truth, one row per level and one column per functional.

    Attributes
    ----------
    levels: exact levels of the order statistics used, nearest to those asked for.
    coverage: share of replicates; its standard error if the level is right is ``sqrt(level (1 - level) / replicates)``.
    standard_error: that, per level.
    p_values: exact binomial, two-sided.
    """

    levels: Float[np.ndarray, " levels"]
    coverage: Float[np.ndarray, "levels k"]
    standard_error: Float[np.ndarray, " levels"]
    p_values: Float[np.ndarray, "levels k"]


def rank_test(
    truth: Float[np.ndarray, "replicates k"],
    samples: Float[np.ndarray, "replicates M k"],
    rng: np.random.Generator,
    bins: int = 8,
) -> RankTest:
    """Simulation-based calibration (Talts et al. 2018): is the truth's rank among its samples uniform?

    The chi-squared test over `bins` equal groups of ranks sees bias, and too much and too little spread, without being
    told which.

    Raises
    ------
    ValueError: arrays that do not belong together; ``M + 1`` not a multiple of `bins`; fewer than 5 replicates per bin,
        where the chi-squared law of the statistic no longer holds.
    """
    ranks = sbc_ranks(truth, samples, rng)
    p_values = uniformity(ranks, samples.shape[1], bins)
    return RankTest(ranks, p_values, float(holm(p_values).min()))


def sbc_ranks(
    truth: Float[np.ndarray, "replicates k"], samples: Float[np.ndarray, "replicates M k"], rng: np.random.Generator
) -> Int[np.ndarray, "replicates k"]:
    """How many samples lie below the truth, 0 to M; among equals the place is drawn at random, or a discrete
    functional would look miscalibrated.

    Raises
    ------
    ValueError: arrays that do not belong together, or that hold NaN.
    """
    check_replicates(truth, samples)
    below = (samples < truth[:, None]).sum(axis=1)
    ties = (samples == truth[:, None]).sum(axis=1)
    return below + rng.integers(0, ties + 1)


def uniformity(ranks: Int[np.ndarray, "replicates k"], n_samples: int, bins: int = 8) -> Float[np.ndarray, " k"]:
    """p-values of Pearson's chi-squared test that ranks 0 to `n_samples` are equally likely, column by column.

    Raises
    ------
    ValueError: as `rank_test`.
    """
    if (n_samples + 1) % bins:
        raise ValueError(f"{n_samples + 1} possible ranks do not fall into {bins} equal bins: choose a divisor")
    if len(ranks) < 5 * bins:
        raise ValueError(f"{len(ranks)} replicates are too few for {bins} bins: at least 5 per bin")
    binned = ranks * bins // (n_samples + 1)
    counts = np.stack([(binned == b).sum(axis=0) for b in range(bins)])
    return stats.chisquare(counts, axis=0).pvalue


def holm(p_values: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Adjusted p-values: rejecting those below alpha errs anywhere with probability at most alpha (Holm 1979)."""
    p_values = np.asarray(p_values)
    order = np.argsort(p_values)
    stepwise = np.maximum.accumulate((len(p_values) - np.arange(len(p_values))) * p_values[order])
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(stepwise, 1.0)
    return adjusted


def tarp(
    truth: Float[np.ndarray, "replicates k"],
    samples: Float[np.ndarray, "replicates M k"],
    references: Float[np.ndarray, "replicates k"],
    rng: np.random.Generator,
) -> CoverageCurve:
    """Tests of accuracy with random points (Lemos et al. 2023): joint calibration of a few functionals.

    Around a reference point that knows nothing of the truth but its measurement, the ball that reaches to the truth
    holds a uniform share of the samples if these are right. Distances are Euclidean after each functional
    is divided by its standard deviation over truths and samples alike.

    Parameters
    ----------
    references: one point per replicate, random and preferably near where that replicate's measurement puts the truth:
        references that ignore the measurement cannot see samples that do so too, and references as often on one side of
        the truth as on the other cannot see a bias.
    rng: places the truth among samples at equal distances.

    Raises
    ------
    ValueError: arrays that do not belong together, or that hold NaN.
    """
    check_replicates(truth, samples)
    if references.shape != truth.shape:
        raise ValueError(f"references {references.shape}: one per truth {truth.shape} is expected")
    # Truths are scaled with their samples, which keeps them exchangeable; a constant functional adds no distance.
    scale = np.concatenate([truth[:, None], samples], axis=1).std(axis=(0, 1))
    scale[scale == 0] = 1.0
    of_truth = np.linalg.norm((truth - references) / scale, axis=-1)
    of_samples = np.linalg.norm((samples - references[:, None]) / scale, axis=-1)
    rank = sbc_ranks(of_truth[:, None], of_samples[..., None], rng)[:, 0]
    # A random place within the rank's step makes the share continuous and exactly uniform, as Kolmogorov's law asks.
    share = (rank + rng.random(len(rank))) / (samples.shape[1] + 1)
    credibility = np.linspace(0, 1, samples.shape[1] + 2)
    coverage = np.searchsorted(np.sort(share), credibility, side="right") / len(share)
    return CoverageCurve(credibility, coverage, float(stats.kstest(share, "uniform").pvalue))


def interval_coverage_from_ranks(
    ranks: Int[np.ndarray, "replicates k"], n_samples: int, levels: Sequence[float] = (0.5, 0.8, 0.9)
) -> IntervalCoverage:
    """Coverage of central intervals between order statistics, over replicates.

    The interval from the `j`-th smallest to the `j`-th largest of M samples holds a further draw with probability
    ``1 - 2j/(M + 1)``, exactly; `j` is chosen to come nearest to the level. Across the pixels of one image, which
    are not independent replicates, use `mri_posterior.metrics.interval_coverage`.

    Raises
    ------
    ValueError: a level outside of (0, 1), or one that `n_samples` cannot resolve.
    """
    steps = np.array([round((1 - level) / 2 * (n_samples + 1)) for level in levels])
    if not all(0 < level < 1 for level in levels) or (steps < 1).any() or (2 * steps > n_samples).any():
        raise ValueError(f"levels {tuple(levels)}: {n_samples} samples have no order statistics there")
    exact = 1 - 2 * steps / (n_samples + 1)
    inside = np.stack([((ranks >= j) & (ranks <= n_samples - j)).sum(axis=0) for j in steps])
    test = np.vectorize(lambda count, level: stats.binomtest(int(count), len(ranks), level).pvalue)
    p_values = test(inside, exact[:, None])
    return IntervalCoverage(exact, inside / len(ranks), np.sqrt(exact * (1 - exact) / len(ranks)), p_values)
