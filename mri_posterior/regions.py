"""What do posterior samples say of a region: its mean, whether that exceeds a threshold, how it differs from another?

Pixels of a posterior are correlated, so the standard deviation of a region's mean cannot be had from a map of pixel
standard deviations: dividing by the root of the number of pixels takes them as independent, and claims far too much.
Here the quantity is computed of every sample, and its spread over the samples is its uncertainty.

Samples are magnitudes ``[M, H, W]`` in any unit, masks boolean ``[H, W]``. What the samples do not know, such as a
prior that has never seen the anatomy, is not in these figures either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from mri_posterior.errors import UserError
from mri_posterior.metrics import credible_interval


@dataclass(frozen=True)
class RegionEstimate:
    """The posterior of one number, as its samples show it.

    Attributes
    ----------
    mean, std: over the samples.
    standard_error: Monte-Carlo error of `mean`, ``std / sqrt(M)``; that of `std` is ``std / sqrt(2 (M - 1))``.
    lower, upper: interval that holds one further draw with probability `level` (`credible_interval`).
    n_samples: M.
    """

    mean: float
    std: float
    standard_error: float
    lower: float
    upper: float
    level: float
    n_samples: int


@dataclass(frozen=True)
class Exceedance:
    """How probable it is that a number exceeds a threshold, as far as M samples can say.

    Attributes
    ----------
    probability: never 0 or 1, see `probability_above`.
    standard_error: of `probability`.
    samples_above, n_samples: what was counted.
    resolution: the smallest probability that so many samples can state.
    """

    threshold: float
    probability: float
    standard_error: float
    samples_above: int
    n_samples: int
    resolution: float


@dataclass(frozen=True)
class Contrast:
    """Two regions compared sample by sample, so that what they share cancels.

    Attributes
    ----------
    difference: first minus second, in the samples' unit.
    ratio: first over second; None where the second is zero in some sample.
    positive: probability that the first is the brighter one.
    """

    difference: RegionEstimate
    ratio: RegionEstimate | None
    positive: Exceedance


def rectangle(shape: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """The mask of ``[rows[0]:rows[1], columns[0]:columns[1]]``, half-open as in NumPy and counted from the top left.

    Raises
    ------
    UserError: empty, or not within an image of `shape`.
    """
    for name, (first, last), size in zip(("rows", "columns"), (rows, columns), shape, strict=True):
        if not 0 <= first < last <= size:
            raise UserError(
                f"rectangle: {name} {first} to {last} are no part of 0 to {size}: give first and last + 1 within that"
            )
    mask = np.zeros(shape, dtype=bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def region_means(magnitudes: Float[np.ndarray, "M H W"], mask: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, " M"]:
    """Mean of each sample over a region: draws of the region mean's posterior.

    Raises
    ------
    UserError: an empty region, or a mask of another size than the images.
    ValueError: complex images, whose mean would lose signal where phases differ: take their magnitude.
    """
    if np.iscomplexobj(magnitudes):
        raise ValueError("regions are measured on magnitudes: pass np.abs(samples)")
    if mask.shape != magnitudes.shape[1:]:
        raise UserError(f"the mask is {mask.shape}, the images are {magnitudes.shape[1:]}: draw it on the stored image")
    if not mask.any():
        raise UserError("the region is empty: mark at least one pixel")
    return magnitudes[:, mask.astype(bool)].mean(axis=1, dtype=np.float64)


def estimate(draws: Float[np.ndarray, " M"], level: float = 0.9, *, nonnegative: bool = False) -> RegionEstimate:
    """Mean, spread and credible interval of a number from its draws.

    The interval is that of the pixel maps: order statistics where M allows, Student's t for fewer samples. The mean of
    many pixels is nearer to normal than one pixel's value, so the t interval does better here than there.

    Raises
    ------
    UserError: a single draw, or a level outside (0, 1).
    """
    lower, upper = credible_interval(np.asarray(draws, dtype=np.float64), level, nonnegative=nonnegative)
    std = float(np.std(draws, ddof=1))
    return RegionEstimate(
        float(np.mean(draws)), std, std / math.sqrt(len(draws)), float(lower), float(upper), level, len(draws)
    )


def probability_above(draws: Float[np.ndarray, " M"], threshold: float) -> Exceedance:
    """Probability that a number exceeds `threshold`: ``(k + 1) / (M + 2)`` where k of M draws do (Laplace's rule).

    Why not ``k/M``: it says 0 or 1 as soon as all draws lie on one side, which M of them do not know. Why not Student's
    t, as for the interval: far from the draws it would be its assumed shape that speaks. This rule assumes none: it is
    exact if the threshold is as plausible a value as any draw, for then k is as likely to be 0 as 1, … or M, and of a
    further draw and the threshold the former is the larger with just this probability. For a threshold more
    extreme than that it errs towards 1/2, and ``1/(M + 2)`` reads *at most*.

    The standard error is that of the probability's posterior, Beta(k + 1, M - k + 1).

    Raises
    ------
    UserError: a threshold that is not finite.
    """
    if not math.isfinite(threshold):
        raise UserError(f"threshold {threshold}: it must be a number")
    n, above = len(draws), int(np.count_nonzero(np.asarray(draws) > threshold))
    probability = (above + 1) / (n + 2)
    error = math.sqrt(probability * (1 - probability) / (n + 3))
    return Exceedance(float(threshold), probability, error, above, n, 1 / (n + 2))


def contrast(first: Float[np.ndarray, " M"], second: Float[np.ndarray, " M"], level: float = 0.9) -> Contrast:
    """Difference and ratio of two numbers of the same samples, draw by draw.

    Parameters
    ----------
    first, second: `region_means` of two regions; element i of both is of the same sample.

    Raises
    ------
    UserError: as `estimate`.
    ValueError: different numbers of draws.
    """
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} draws: both regions must be measured on the same samples")
    ratio = estimate(first / second, level, nonnegative=True) if np.all(second > 0) else None
    return Contrast(estimate(first - second, level), ratio, probability_above(first - second, 0.0))


def widened(interval: RegionEstimate, factor: float, *, nonnegative: bool = False) -> RegionEstimate:
    """The interval stretched about its middle by a conformal factor found on *pixels*.

    That factor restores the coverage of pixel intervals. Whether it restores that of a region's mean depends on how the
    errors of neighbouring pixels hang together, of which it knows nothing: a caution, not a guarantee.
    """
    middle, half = (interval.lower + interval.upper) / 2, factor * (interval.upper - interval.lower) / 2
    lower = max(middle - half, 0.0) if nonnegative else middle - half
    return replace(interval, lower=lower, upper=middle + half)
