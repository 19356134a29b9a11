"""Are there enough samples, and have the chains forgotten where they came from? Without a reference, from them alone.

Two questions that are easily mixed up. *Convergence* (R-hat, effective sample size, stuck chains) compares chains over
the steps of their last level: have they reached the posterior? *Monte-Carlo error* says how far the mean and the
standard deviation shown are from those of infinitely many such samples. Neither sees a wrong prior or noise level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float
from scipy import stats

from mri_posterior.posterior import SHORTEST, ChainMoments, HalfChains, PosteriorSamples

Map = Float[torch.Tensor, "H W"]

DISAGREE = 1.5
"""R-hat above which chains are in different places: far beyond the chance of a few short chains (see tests)."""
WORRYING_SHARE = 0.05
"""Of the pixels: fewer are no reason for an alarm."""
FALSE_ALARM = 0.01
"""At most this often are chains called stuck whose halves are independent of one another."""


def rhat(chains: ChainMoments) -> Map:
    """Split potential scale reduction per pixel: near 1 where all chains roam the same values all along.

    Square root of the pooled variance over the variance within half-chains (Gelman and Rubin 1992; halves: Gelman et
    al. 2013); real and imaginary part count as two draws of one quantity. Chains that keep different modes, or drift,
    disagree more than each of them wanders. Levels of fewer than ten steps are compared whole; a pixel in which
    nothing ever changes has 1.

    Raises
    ------
    ValueError: fewer than two chains.
    """
    if len(chains.mean) < 2:
        raise ValueError("R-hat compares chains: it needs at least two")
    if chains.halves is None:
        within = chains.variance.mean(0)
        pooled = within * (chains.steps - 1) / chains.steps + _spread(chains.mean)
    else:
        draws = len(chains.halves.autocovariance)
        within = chains.halves.autocovariance[0] * draws / (draws - 1)
        pooled = _pooled(chains.halves)
    return torch.where(pooled > 0, (pooled / within.clamp_min(_tiny(within))).sqrt(), 1.0)


def disagreeing_share(chains: ChainMoments) -> float:
    """Share of the pixels in which chains disagree; what it says, and what to do: `chain_faults`."""
    return float((rhat(chains) > DISAGREE).double().mean())


def ess(chains: ChainMoments) -> Map | None:
    """Effective sample size per pixel: of how many independent draws all states together are worth for their mean.

    ``S / tau`` of S states, ``tau = 1 + 2 sum rho_t`` by Geyer's initial monotone sequence over half-chains (Geyer
    1992; Vehtari et al. 2021, eq. 10-13), at most ``S log10(S)``. The samples written are the chains' ends alone,
    which are independent however small this is: it judges mixing. None for chains of fewer than ten.
    """
    if chains.halves is None:
        return None
    autocovariance, pooled = chains.halves.autocovariance, _pooled(chains.halves)
    draws = len(autocovariance)
    size = chains.halves.means.shape[0] * 2 * draws
    within = autocovariance[0] * draws / (draws - 1)
    rho = 1 - (within - autocovariance) / pooled.clamp_min(_tiny(pooled))
    rho[0] = 1.0
    # Sums of an even and the following odd lag are positive and decrease, in truth: the first that is not positive ends
    # the sequence, larger ones are cut down to their predecessor. Of the pair that ends it the even lag still counts.
    # Lags of which a half-chain holds fewer than three pairs are left out.
    last = max(math.ceil(draws / 2) - 2, 0)
    pairs = rho[: 2 * last + 2 : 2] + rho[1 : 2 * last + 2 : 2]
    end = (pairs > 0).int().cumprod(0).sum(0).clamp_max(last)[None]
    used = torch.arange(last + 1, device=end.device).reshape(-1, *[1] * (end.ndim - 1)) < end
    even = rho.gather(0, 2 * end)
    even = torch.where(pairs.gather(0, end) >= 0, even, even.clamp_min(0))[0]
    tau = -1 + 2 * (torch.cummin(pairs, 0).values * used).sum(0) + even
    return torch.where(pooled > 0, size / tau.clamp_min(1 / math.log10(size)), float(size))


def stuck_share(chains: ChainMoments) -> float:
    """Share of the pixels in which each chain keeps a value of its own over the whole last level.

    There the means of a chain's two halves are alike: correlated, over the chains, above a threshold. Chains that
    mix have independent halves, whose correlation over n chains is that of two random directions in 2(n - 1)
    dimensions (the centred real and imaginary parts). The threshold is 0.8, reached by a chain that needs longer than
    the level to forget, and for few chains so high that a pixel passes by chance with probability
    ``FALSE_ALARM * WORRYING_SHARE``: by Markov's inequality more than `WORRYING_SHARE` of the pixels then pass with
    probability `FALSE_ALARM` at most, however pixels depend on one another. Frozen chains are stuck. 0 where the level
    is too short to be cut in two.
    """
    if chains.halves is None or len(chains.mean) < 2:
        return 0.0
    first, second = (chains.halves.means - chains.halves.means.mean(0)).unbind(1)
    together = (first.conj() * second).real.sum(0)
    apart = first.abs().square().sum(0) * second.abs().square().sum(0)
    # The cosine of the angle between random directions of d dimensions: its square is Beta(1/2, (d - 1)/2).
    chance = stats.beta.isf(2 * FALSE_ALARM * WORRYING_SHARE, 0.5, len(first) - 1.5)
    alike = together > max(0.8, math.sqrt(chance)) * apart.sqrt()
    # All chains frozen at one value differ in nothing: there motion is below the rounding of the values themselves.
    rounding = 8 * torch.finfo(apart.dtype).eps * chains.halves.means.abs().amax((0, 1))
    return float((alike | (chains.halves.autocovariance[0].sqrt() <= rounding)).double().mean())


def chain_faults(numbers: Mapping[str, float]) -> list[str]:
    """What is wrong with the chains, one plain line each; nothing for chains that mix (false alarms: `stuck_share`).

    `numbers` are those of `slice_diagnostics`; of several slices, the mean ``disagreeing_share`` and the largest
    ``stuck_share``. Draws without chains have neither, and no fault.
    """
    lines = []
    if numbers.get("disagreeing_share", 0.0) > WORRYING_SHARE:
        lines.append(
            f"chains disagree (R-hat above {DISAGREE:g}) in {100 * numbers['disagreeing_share']:.0f} % of the pixels: "
            "raise sampler.final_steps; where that does not help the posterior has several modes, whose shares only "
            "sampler.name=tempered_smc finds"
        )
    if numbers.get("stuck_share", 0.0) > WORRYING_SHARE:
        lines.append(
            f"chains are stuck in {100 * numbers['stuck_share']:.0f} % of the pixels: over the whole last level each "
            "keeps a value of its own (a mode, slow mixing, or no motion), so its samples rest on the way down alone"
        )
    return lines


def relative_error(result: PosteriorSamples) -> tuple[Map, Map]:
    """The magnitude's standard deviation, and the relative Monte-Carlo error of the one that the samples show.

    The samples are M independent draws, whose unbiased variance ``s^2`` has variance ``k4/M + 2 v^2/(M - 1)``, v the
    true variance and k4 the fourth cumulant, and the error of s is that of ``s^2`` over 2s: for normal draws
    ``1/sqrt(2 (M - 1))`` of it.

    - Chains: v and k4 are those of all states of the last level, pooled: many more than there are samples, though
      not independent. Within plus between variance is unbiased for v however slowly the chains mix.
    - Otherwise v is the samples' own and the error the jackknife's, which errs towards caution (Efron and Stein 1981:
      for normal draws by 9 % with 8 samples, 4 % with 16). Two samples have no jackknife and are taken as normal.

    Particles of ``tempered_smc`` share ancestors, which this does not see. A single sample is a `ValueError`.
    """
    magnitude = result.images.abs()
    m = len(magnitude)
    if m < 2:
        raise ValueError("one sample has no spread: draw at least two")
    variance = magnitude.var(0)
    if result.chains is not None and result.chains.magnitude is not None:
        mean, second, third, fourth = result.chains.magnitude.unbind(1)
        offset = mean - mean.mean(0)
        biased = (second + offset**2).mean(0)
        fourth = (fourth + 4 * offset * third + 6 * offset**2 * second + offset**4).mean(0)
        variance = second.mean(0) + mean.var(0)
        excess = fourth / biased.square().clamp_min(_tiny(biased)) - 3
        relative = ((excess / m + 2 / (m - 1)) / 4).clamp_min(0).sqrt()
    elif m > 2:
        squares = (magnitude - magnitude.mean(0)).square()
        without = ((m - 1) * variance - squares * m / (m - 1)).clamp_min(0) / (m - 2)  # variances of M - 1 draws
        jackknife = (m - 1) ** 2 / m * without.sqrt().var(0)
        relative = (jackknife / variance.clamp_min(_tiny(variance))).sqrt()
    else:
        relative = torch.full_like(variance, 1 / math.sqrt(2 * (m - 1)))
    return variance.sqrt(), relative


@dataclass(frozen=True)
class SliceDiagnostics:
    """One slice's diagnostics.

    Attributes
    ----------
    maps: ``[H, W]``: ``mcse_mean`` and ``mcse_std``, Monte-Carlo standard errors of the magnitude's mean and standard
        deviation in the unit of the images, and of chains the unit-free ``rhat`` and ``ess``.
    numbers: ``mcse_std_relative``, median over the tissue of `relative_error`; of chains ``disagreeing_share`` and
        ``stuck_share`` of all pixels, and the tissue's ``median_rhat`` and ``median_ess``.
    """

    maps: dict[str, Map]
    numbers: dict[str, float]


def slice_diagnostics(result: PosteriorSamples, tissue: Bool[torch.Tensor, "H W"]) -> SliceDiagnostics:
    """All diagnostics of one slice; draws that are independent by design have Monte-Carlo errors and no R-hat.

    The error of the mean magnitude is that of ``|mean|`` too, to first order where the signal is above its spread,
    and exactly where there is no signal at all (both are Rayleigh's); in between ``|mean|``'s can be 1.5 times it.
    """
    std, relative = relative_error(result)
    maps = {"mcse_mean": std / math.sqrt(len(result.images)), "mcse_std": std * relative}
    numbers = {"mcse_std_relative": _median(relative, tissue)}
    if result.chains is not None and len(result.chains.mean) > 1:
        maps["rhat"] = rhat(result.chains)
        numbers["disagreeing_share"] = disagreeing_share(result.chains)
        numbers["stuck_share"] = stuck_share(result.chains)
        numbers["median_rhat"] = _median(maps["rhat"], tissue)
        effective = ess(result.chains)
        if effective is not None:
            maps["ess"] = effective
            numbers["median_ess"] = _median(effective, tissue)
    return SliceDiagnostics(maps, numbers)


@dataclass(frozen=True)
class RegionReport:
    """The mean magnitude of a region: its posterior, and how well the samples know it.

    Attributes
    ----------
    mean, std: over the samples, in their unit.
    mcse_mean, mcse_std: Monte-Carlo standard errors of these two.
    n_samples: how many.
    rhat, ess: rank-normalised split R-hat (the larger of bulk and folded) and bulk effective sample size of the
        chains (Vehtari et al. 2021); None without their states. Above 1.1, or below 100, distrust them.
    """

    mean: float
    std: float
    mcse_mean: float
    mcse_std: float
    n_samples: int
    rhat: float | None = None
    ess: float | None = None


def region_report(
    images: Complex[np.ndarray, "n h w"],
    mask: Bool[np.ndarray, "h w"],
    states: Complex[np.ndarray, "n t h w"] | None = None,
) -> RegionReport:
    """Is the mean magnitude of a region known well enough, and do chains agree on it?

    Chains that look mixed pixel by pixel can disagree on a region, whose mean has less noise to hide in.

    Parameters
    ----------
    images: samples, such as one slice of a result file's ``samples``.
    states: of the chains that ended in these samples, from `sample` with ``keep_states``.

    Raises
    ------
    ValueError: an empty region, a mask of another size, a single sample, or fewer than ten states.
    """
    if mask.shape != images.shape[1:] or not mask.any() or len(images) < 2:
        raise ValueError(f"a region is some pixels of two images or more: {mask.sum()} {mask.shape} of {images.shape}")
    values, chains, mixing = _region_means(images, mask), None, {}
    if states is not None:
        traces = _region_means(states, mask)
        if states.shape[:1] + states.shape[2:] != images.shape or states.shape[1] < SHORTEST:
            raise ValueError(f"states {states.shape}: at least ten for each of the images {images.shape} are expected")
        chains = ChainMoments.of(traces[..., None, None] + 0j)
        mixing = rank_normalised(traces.numpy())
    true, relative = (float(value) for value in relative_error(PosteriorSamples(values + 0j, 0, [], chains=chains)))
    n = len(values)
    return RegionReport(float(values.mean()), float(values.std()), true / math.sqrt(n), true * relative, n, **mixing)


def rank_normalised(traces: Float[np.ndarray, "n t"]) -> dict[str, float]:
    """``rhat`` and ``ess`` of one scalar's chains after its ranks were made normal: sound for heavy tails too.

    R-hat is the larger of that of the ranks and of the ranks of distances from the median, which sees chains of one
    place and different spread (Vehtari et al. 2021, section 4).
    """
    half = traces.shape[1] // 2
    kept = np.concatenate([traces[:, :half], traces[:, traces.shape[1] - half :]], axis=1)
    bulk, folded = (_normal_scores(values) for values in (kept, np.abs(kept - np.median(kept))))
    return {"rhat": max(float(rhat(bulk)), float(rhat(folded))), "ess": float(ess(bulk))}


def _normal_scores(values: Float[np.ndarray, "n t"]) -> ChainMoments:
    """Chains whose pooled ranks are those of `values`, at the normal quantiles of Blom (1958)."""
    ranks = stats.rankdata(values).reshape(values.shape)
    scores = torch.from_numpy(stats.norm.ppf((ranks - 3 / 8) / (values.size + 1 / 4)))
    return ChainMoments.of(scores[..., None, None] + 0j)


def _region_means(images: Complex[np.ndarray, "*n h w"], mask: Bool[np.ndarray, "h w"]) -> torch.Tensor:
    return torch.from_numpy(np.abs(images)[..., mask].mean(axis=-1, dtype=np.float64))


def _spread(means: Complex[torch.Tensor, " n *shape"]) -> Float[torch.Tensor, "*shape"]:
    """Variance of means, per real channel."""
    return (means - means.mean(0)).abs().square().sum(0) / 2 / (len(means) - 1)


def _pooled(halves: HalfChains) -> Float[torch.Tensor, "*shape"]:
    """Variance within half-chains and between them: unbiased for that of the target, if they sample it."""
    return halves.autocovariance[0] + _spread(halves.means.flatten(0, 1))


def _tiny(values: torch.Tensor) -> float:
    return torch.finfo(values.dtype).tiny


def _median(values: Map, where: Bool[torch.Tensor, "H W"]) -> float:
    return float(values[where].double().quantile(0.5)) if where.any() else math.nan
