"""Is the spread of posterior samples the size of their error, and are they biased?

Replicates are those of `calibration`: a truth, a measurement of it, and samples given that. If the sampler is right,
the truth is one further draw. Arrays are NumPy's, real or complex: `truth` is ``[replicates, ...]``, `samples`
``[replicates, M, ...]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A figure, its standard error over replicates, and what a right sampler gives."""

    value: float
    standard_error: float
    expected: float

    @property
    def z(self) -> float:
        """Standard errors away from what is expected."""
        return (self.value - self.expected) / self.standard_error


def spread_skill(truth: Num[np.ndarray, "replicates ..."], samples: Num[np.ndarray, "replicates M ..."]) -> Estimate:
    """Is the samples' spread the size of their mean's error? ``V/B``: 1 expected, below it overconfident.

    ``V = mean |s_j - s|^2 / (M - 1)`` summed over samples and ``B = mean |s - x|^2 - V/M``, s the mean of M samples:
    both are unbiased for the posterior variance. Complex arrays, such as whole images, count both channels.

    Raises
    ------
    ValueError: arrays that do not belong together, NaN, or a single sample.
    """
    return error_sums(truth, samples).spread_skill()


def averaging_gain(truth: Num[np.ndarray, "replicates ..."], samples: Num[np.ndarray, "replicates M ..."]) -> Estimate:
    """By how many dB the mean of M samples beats one sample in squared error: ``10 log10(2M/(M + 1))`` expected.

    A sample misses the truth by twice the posterior variance, the mean by ``1 + 1/M`` times it. Too little gain means
    too little spread, as much as biased samples.

    Raises
    ------
    ValueError: as `spread_skill`.
    """
    return error_sums(truth, samples).averaging_gain()


@dataclass(frozen=True)
class ErrorSums:
    """What spread, skill and bias are computed from: sums over the pixels of each replicate.

    Attributes
    ----------
    count: pixels.
    variance: of the samples, unbiased.
    error, squared_error: of the samples' mean, signed and squared; of complex images real part plus imaginary part.
    n_samples: M.
    """

    count: Float[np.ndarray, " replicates"]
    variance: Float[np.ndarray, " replicates"]
    error: Float[np.ndarray, " replicates"]
    squared_error: Float[np.ndarray, " replicates"]
    n_samples: int

    def grouped(self, groups: Sequence[object] | np.ndarray) -> ErrorSums:
        """One replicate per group: slices of a subject depend on one another, subjects do not."""
        sums = (group_sums(a, groups) for a in (self.count, self.variance, self.error, self.squared_error))
        return ErrorSums(*sums, self.n_samples)

    def spread_skill(self) -> Estimate:
        return ratio(self.variance, self.squared_error - self.variance / self.n_samples, 1.0)

    def averaging_gain(self) -> Estimate:
        m = self.n_samples
        # Mean over samples of |s_j - x|^2, without forming the differences again.
        gain = ratio(self.squared_error + self.variance * (m - 1) / m, self.squared_error, 2 * m / (m + 1))
        error = 10 / math.log(10) * gain.standard_error / gain.value
        return Estimate(10 * math.log10(gain.value), error, 10 * math.log10(gain.expected))


def error_sums(truth: Num[np.ndarray, "replicates ..."], samples: Num[np.ndarray, "replicates M ..."]) -> ErrorSums:
    """Sums over all axes but the first.

    Raises
    ------
    ValueError: as `spread_skill`.
    """
    check_replicates(truth, samples)
    n, n_samples = samples.shape[:2]
    if n_samples < 2:
        raise ValueError("spread needs at least 2 samples per replicate")
    mean = samples.mean(axis=1)
    error = (mean - truth).reshape(n, -1)
    variance = (np.abs(samples - mean[:, None]) ** 2).reshape(n, -1).sum(axis=1) / (n_samples - 1)
    signed = (error.real + error.imag).sum(axis=1)
    return ErrorSums(np.full(n, float(error.shape[1])), variance, signed, (np.abs(error) ** 2).sum(axis=1), n_samples)


def faults(sums: ErrorSums, tolerance: float = 0.1, alpha: float = 0.01) -> list[str]:
    """What is wrong with the samples, one plain line each: over-dispersed, under-dispersed, biased.

    Bias is a common offset of all pixels, and does not count as error when spread is compared with error: each fault
    has its own name. Four one-sided t-tests over replicates (too much, too little; too high, too low), each at
    ``alpha / 4``, so that right samples are called faulty with probability `alpha` at most, as far as the mean of the
    replicates is normal. Group what depends on one another first (`ErrorSums.grouped`).

    Parameters
    ----------
    tolerance: spread may be off by this share, and a bias this many posterior standard deviations: a tenth of spread
        changes the coverage of a 90 % interval by 0.03.

    Raises
    ------
    ValueError: fewer than two replicates.
    """
    n = len(sums.count)
    if n < 2:
        raise ValueError("faults are judged over replicates: there must be at least two")
    critical = stats.t.isf(alpha / 4, n - 1)

    def positive(values: Float[np.ndarray, " n"]) -> bool:
        return bool(values.mean() > critical * values.std(ddof=1) / math.sqrt(n))

    deviation = math.sqrt(sums.variance.sum() / sums.count.sum())
    bias = sums.error.sum() / sums.count.sum()
    # sum (e - b)^2 - V/M: an estimate of the posterior variance, as V is if the spread is right.
    skill = sums.squared_error - 2 * bias * sums.error + bias**2 * sums.count - sums.variance / sums.n_samples
    times = math.sqrt(sums.variance.sum() / skill.sum()) if skill.sum() > 0 else math.inf
    found = []
    if positive(sums.variance - (1 + tolerance) ** 2 * skill):
        found.append(f"samples are over-dispersed: spread is {times:.2g} times the error")
    if positive((1 - tolerance) ** 2 * skill - sums.variance):
        found.append(f"samples are under-dispersed: spread is {times:.2g} times the error")
    allowed = tolerance * deviation * sums.count
    if positive(sums.error - allowed) or positive(-sums.error - allowed):
        where = "high" if bias > 0 else "low"
        found.append(f"samples are biased: their mean is {abs(bias) / deviation:.2g} standard deviations too {where}")
    return found


def group_sums(values: Num[np.ndarray, " n"], groups: Sequence[object] | np.ndarray) -> Num[np.ndarray, " groups"]:
    """Sums over equal `groups`, in their sorted order."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=values)


def ratio(numerator: Float[np.ndarray, " n"], denominator: Float[np.ndarray, " n"], expected: float) -> Estimate:
    """Ratio of means, with the delta method's standard error over replicates."""
    value = numerator.mean() / denominator.mean()
    residual = numerator - value * denominator
    error = residual.std(ddof=1) / math.sqrt(len(residual)) / abs(denominator.mean())
    return Estimate(float(value), float(error), expected)


def check_replicates(truth: np.ndarray, samples: np.ndarray) -> None:
    """Refuse arrays that do not belong together as `calibration` describes.

    Raises
    ------
    ValueError: other shapes, or NaN.
    """
    if samples.ndim != truth.ndim + 1 or truth.shape != samples.shape[:1] + samples.shape[2:]:
        raise ValueError(
            f"truth {truth.shape} and samples {samples.shape}: expected [replicates, …] and [replicates, M, …]"
        )
    if np.isnan(truth).any() or np.isnan(samples).any():
        raise ValueError("truth or samples hold NaN: a rank would count it as neither above nor below")
