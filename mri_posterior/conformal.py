"""By how much must intervals be scaled so that a stated share of the pixels of future images lies inside?

Risk-controlling prediction sets (Bates et al., J. ACM 2021), as used for image-to-image regression (Angelopoulos et
al., ICML 2022). Every interval is scaled by one factor about its middle. The loss of an image is the share of its
tissue pixels outside; it can only fall as the factor grows. The factor chosen is the smallest, going down from one that
is certainly large enough, at which the mean loss is shown to be at most ``alpha``:
``P(E[loss] <= alpha) >= 1 - delta`` over calibration sets of independent units of one law, whatever prior, sampler or
data are. A unit is what future data are drawn as: a subject, or (weaker) a slice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import special, stats

from mri_posterior.errors import UserError

FACTORS = 0.25 * 1.01 ** np.arange(419)
"""Candidate factors: 0.25 to 16 in steps of 1 %, well below what any coverage is known to."""


@dataclass(frozen=True)
class ConformalConfig:
    """How intervals are scaled.

    Attributes
    ----------
    levels: of the intervals to scale; `alpha` is 1 - level.
    delta: how often, over calibration sets, the promise may fail.
    unit: ``subject`` or ``slice``. Slices of one subject are alike, so that as units they count for more than they are
        worth: the promise then holds for further slices of *these* subjects, and for others only roughly.
    bound: ``waudby_smith_ramdas`` learns the losses' spread from the data; ``hoeffding_bentkus`` assumes the worst, and
        for losses that hardly vary, as shares of many pixels do, asks for several times fewer misses than promised.
    test_share: of the subjects that are left out of the calibration, to test it on.

    Raises
    ------
    UserError: a value is out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    levels: tuple[float, ...] = (0.9,)
    delta: float = 0.1
    unit: Literal["subject", "slice"] = "slice"
    bound: Literal["waudby_smith_ramdas", "hoeffding_bentkus"] = "waudby_smith_ramdas"
    test_share: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("delta", self.delta), ("test_share", self.test_share)):
            if not 0 < value < 1:
                raise UserError(f"conformal.{name} {value}: it must lie between 0 and 1")
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise UserError(f"conformal.levels {self.levels}: give levels between 0 and 1, for example [0.9]")


def scale_interval(
    lower: Float[np.ndarray, "*shape"], upper: Float[np.ndarray, "*shape"], factor: float
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """Intervals of a magnitude widened (or narrowed) by `factor` about their middle; the lower end is clipped at 0."""
    middle, half = (lower + upper) / 2, factor * (upper - lower) / 2
    return np.maximum(middle - half, 0), middle + half


def needed_factor(
    target: Float[np.ndarray, "*shape"],
    lower: Float[np.ndarray, "*shape"],
    upper: Float[np.ndarray, "*shape"],
    margin: float = 0.0,
) -> Float[np.ndarray, "*shape"]:
    """The factor from which on each scaled interval holds its target; infinite where the interval has no width.

    Parameters
    ----------
    target: magnitudes, not negative (so that clipping at 0 loses none).
    margin: half width of the target's own noise. Both half widths add in square, as variances do.
    """
    miss = np.sqrt(np.maximum((target - (lower + upper) / 2) ** 2 - margin**2, 0))
    half = (upper - lower) / 2
    return np.where(miss > 0, np.divide(miss, half, out=np.full_like(miss, np.inf), where=half > 0), 0)


def losses(needed: Float[np.ndarray, " pixels"]) -> Float[np.ndarray, " factors"]:
    """Share of one image's pixels that its intervals, scaled by each of `FACTORS`, do not hold."""
    return 1 - np.searchsorted(np.sort(needed), FACTORS, side="right") / len(needed)


def units_needed(alpha: float, delta: float) -> int:
    """Fewest units that can show anything: with losses of 0 throughout, ``(1 - alpha)^n <= delta``."""
    return math.ceil(math.log(delta) / math.log1p(-alpha))


def require_units(config: ConformalConfig, n: int) -> None:
    """Refuse too few calibration units before anything is sampled.

    Raises
    ------
    UserError: naming how many there must be.
    """
    for level in config.levels:
        needed = units_needed(1 - level, config.delta)
        if n < needed:
            raise UserError(
                f"a conformal {level:g} interval with delta {config.delta:g} needs at least {needed} calibration "
                f"{config.unit}s, there are {n}: give more data, raise conformal.delta, or set conformal=null"
            )


def hoeffding_bentkus(values: Float[np.ndarray, " n *tests"], alpha: float) -> Float[np.ndarray, "*tests"]:
    """p-values of a mean above `alpha`, for any distribution on [0, 1] (Bates et al. 2021, section 3.1).

    The smaller of Hoeffding's bound with relative entropy and Bentkus' bound by the binomial tail.
    """
    n, mean = len(values), np.minimum(values.mean(axis=0), alpha)
    entropy = special.rel_entr(mean, alpha) + special.rel_entr(1 - mean, 1 - alpha)
    # Rounding must not turn 3.0000000001 misses into 4.
    bentkus = math.e * stats.binom.cdf(np.ceil(n * mean - 1e-9), n, alpha)
    return np.minimum(np.exp(-n * entropy), np.minimum(bentkus, 1))


def waudby_smith_ramdas(
    values: Float[np.ndarray, " n *tests"], alpha: float, delta: float = 0.1
) -> Float[np.ndarray, "*tests"]:
    """p-values of a mean above `alpha`, for any distribution on [0, 1], by betting (Waudby-Smith and Ramdas 2023).

    A gambler stakes on each value in turn to lie below `alpha`, more boldly the less those before varied. If the mean
    is at least `alpha` the capital is a supermartingale: it ever reaches ``1/p`` with probability p at most (Ville).
    Stakes are those of Bates et al. 2021 (proposition 5) for a test at `delta`, but may go up to where the capital
    could become negative, ``1/(1 - alpha)``, rather than 1.
    """
    n = len(values)
    index = np.arange(1, n + 1).reshape(-1, *[1] * (values.ndim - 1))
    means = (0.5 + np.cumsum(values, axis=0)) / (1 + index)
    variances = (0.25 + np.cumsum((values - means) ** 2, axis=0)) / (1 + index)
    # The stake on a value knows those before it alone.
    known = np.concatenate([np.full_like(variances[:1], 0.25), variances[:-1]])
    stakes = np.minimum(1 / (1 - alpha), np.sqrt(2 * math.log(1 / delta) / (n * known)))
    capital = np.cumprod(1 - stakes * (values - alpha), axis=0)
    return 1 / np.maximum(capital.max(axis=0), 1)


def smallest_factor(
    unit_losses: Float[np.ndarray, "units factors"], config: ConformalConfig, level: float
) -> float | None:
    """The smallest of `FACTORS` down to which every larger one keeps the mean loss at ``1 - level``.

    Going down and stopping at the first failure needs no correction for the many factors tested: the true risk falls
    with the factor, so that a wrong choice means one wrong test, at the last factor whose risk is too large. None where
    the largest factor fails too.

    Parameters
    ----------
    unit_losses: of independent units in random order; `losses` of a slice, or their mean over a subject's slices.

    Raises
    ------
    UserError: too few units (`require_units`).
    """
    require_units(config, len(unit_losses))
    if config.bound == "hoeffding_bentkus":
        p_values = hoeffding_bentkus(unit_losses, 1 - level)
    else:
        p_values = waudby_smith_ramdas(unit_losses, 1 - level, config.delta)
    failed = np.flatnonzero(p_values > config.delta)
    first = failed[-1] + 1 if len(failed) else 0
    return float(FACTORS[first]) if first < len(FACTORS) else None


def split_subjects(subjects: Sequence[str], test_share: float, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Subjects to calibrate on and, disjoint, to test on, in random order; two of each at least.

    Raises
    ------
    UserError: fewer than four subjects.
    """
    names = sorted(set(subjects))
    if len(names) < 4:
        raise UserError(f"{len(names)} subjects: a calibration and a test set need four at least: set conformal=null")
    n_test = min(max(int(test_share * len(names)), 2), len(names) - 2)
    order = [names[i] for i in rng.permutation(len(names))]
    return order[n_test:], order[:n_test]
