"""Diagnostics of chains and samples: quiet where all is well, loud where a fault is put in, errors that are true.

Simulated chains are autoregressive, of known correlation; their pixels are independent replicates of one experiment.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from mri_posterior.diagnostics import (
    DISAGREE,
    FALSE_ALARM,
    WORRYING_SHARE,
    chain_faults,
    disagreeing_share,
    ess,
    rank_normalised,
    region_report,
    relative_error,
    rhat,
    slice_diagnostics,
    stuck_share,
)
from mri_posterior.exact import gaussian_problem, mixture_problem, white
from mri_posterior.posterior import ChainMoments, HalfChains, PosteriorSamples, join_batches
from mri_posterior.samplers import AnnealedLangevin, ReverseDiffusion, TemperedSMC, sample
from mri_posterior.samplers.chains import MOST_STATES, ChainRecorder


@pytest.fixture(scope="module")
def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("arviz", reason="the library that the statistics are compared with")


def autoregressive(generator: torch.Generator, n: int, steps: int, shape: tuple[int, int], memory: float):
    """Stationary chains ``[n, steps, *shape]`` of variance 1 per real channel and correlation ``memory^lag``."""
    fresh = white(generator, n, steps, *shape)
    states = fresh.clone()
    for step in range(1, steps):
        states[:, step] = memory * states[:, step - 1] + math.sqrt(1 - memory**2) * fresh[:, step]
    return states


def drawn(states: torch.Tensor, chains: bool = True) -> PosteriorSamples:
    """The samples that chains end in."""
    return PosteriorSamples(states[:, -1], 0, [], chains=ChainMoments.of(states) if chains else None)


def everywhere(result: PosteriorSamples) -> torch.Tensor:
    return torch.ones(result.images.shape[1:], dtype=torch.bool)


# R-hat and effective sample size


def test_rhat_of_whole_chains_whose_moments_are_known(generator):
    """Chains of `t` independent steps: pooled over within variance is ``(t-1)/t + between/within``."""
    steps = torch.view_as_complex(torch.randn(40, 6, 5, 4, 2, generator=generator, dtype=torch.float64))
    shift = torch.arange(6, dtype=torch.float64)[:, None, None]
    variance = (steps - steps.mean(0)).abs().square().sum(0) / 2 / 39
    near = rhat(ChainMoments(steps.mean(0), variance, 40))
    far = rhat(ChainMoments(steps.mean(0) + shift, variance, 40))
    # Between: chi-squared of 10 degrees over 10, times 1/40 of the within variance; below 4 with probability 1 - 1e-4.
    assert float((near - 1).abs().max()) < 4 / 40
    # Shifts 0..5 have variance 3.5, half of which counts for each real channel.
    assert float(far.square().mean()) == pytest.approx(1 + 3.5 / 2, rel=0.15)


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("steps", [10, 11, 21, 40])
@pytest.mark.parametrize("memory", [-0.5, 0.5, 0.97])
def test_maps_are_the_librarys_statistics_pixel_by_pixel(arviz, generator, n, steps, memory):
    states = autoregressive(generator, n, steps, (2, 3), memory).real
    chains = ChainMoments.of(states + 0j)
    maps = {"rhat": rhat(chains), "ess": ess(chains)}
    for row, column in np.ndindex(2, 3):
        trace = states[:, :, row, column].numpy()
        assert float(maps["rhat"][row, column]) == pytest.approx(arviz.rhat(trace, method="split"), rel=1e-9)
        assert float(maps["ess"][row, column]) == pytest.approx(arviz.ess(trace, method="mean"), rel=1e-9)
    scores = rank_normalised(trace)
    assert scores["rhat"] == pytest.approx(arviz.rhat(trace, method="rank"), rel=1e-9)
    assert scores["ess"] == pytest.approx(arviz.ess(trace, method="bulk"), rel=1e-9)


def test_effective_sample_size_of_known_correlation(generator):
    """``tau = (1 + r)/(1 - r) = 3`` for r = 1/2. Long chains, for halves know nothing of lags beyond them."""
    effective = ess(ChainMoments.of(autoregressive(generator, 8, 200, (12, 12), 0.5)))
    # Each tau errs by some 10 % over 3200 draws (Geyer's window of some 10 lags); averaging 144 pixels leaves 1 %.
    assert float(effective.mean()) == pytest.approx(8 * 200 / 3, rel=0.05)


def test_a_pixel_that_never_changes_is_no_fault():
    chains = ChainMoments.of(torch.zeros(4, 12, 2, 2, dtype=torch.complex64))
    assert (rhat(chains) == 1).all()
    assert (ess(chains) == 4 * 12).all()
    with pytest.raises(ValueError, match="at least two"):
        rhat(ChainMoments(torch.zeros(1, 2, 2) + 0j, torch.ones(1, 2, 2), 3))


# What the sampler remembers


def test_chains_of_one_mode_agree_and_of_several_do_not():
    one = sample(AnnealedLangevin(), gaussian_problem((16, 16), 2, 3, 4, 0.03).posterior, 8, seed=1)
    found = slice_diagnostics(one, everywhere(one)).numbers
    # Half-chains of ten correlated by 1/2 at lag 1: B/W is (1.9/10)/0.9 times an F of 30 and some hundred degrees,
    # and R-hat above 1.5 takes 6.4 times that.
    assert found["disagreeing_share"] == 0
    assert found["stuck_share"] < WORRYING_SHARE
    assert chain_faults(found) == []
    # tau of that correlation is 2 for halves that forget at once: 8 chains of 20 kept steps are worth up to 80.
    assert 40 < found["median_ess"] < 120
    several = sample(AnnealedLangevin(), mixture_problem(5).posterior, 8, seed=1)
    found = slice_diagnostics(several, everywhere(several)).numbers
    assert disagreeing_share(several.chains) == found["disagreeing_share"] > 0.1
    assert float(rhat(several.chains).max()) > DISAGREE
    assert [line.split(" in ")[0].split(" (")[0] for line in chain_faults(found)] == [
        "chains disagree",
        "chains are stuck",
    ]


def test_moments_are_those_of_the_last_level_and_join_over_batches():
    problem = gaussian_problem((8, 8), 1, 2, 4, 0.05)
    sampler = AnnealedLangevin(final_steps=10)
    whole = sample(sampler, problem.posterior, 4, seed=2, keep_states=True)
    parts = [sample(sampler, problem.posterior, 2, seed=2, first=first, keep_states=True) for first in (0, 2)]
    assert whole.chains.steps == 11
    assert torch.equal(whole.chains.states[:, -1], whole.images)
    joined = join_batches(parts)
    for name in ("mean", "variance", "magnitude", "states"):
        assert torch.allclose(getattr(joined.chains, name), getattr(whole.chains, name)), name
    assert torch.allclose(joined.chains.halves.means, whole.chains.halves.means)
    assert torch.allclose(joined.chains.halves.autocovariance, whole.chains.halves.autocovariance)
    assert joined.seeds == whole.seeds
    assert torch.allclose(joined.images, whole.images)
    assert sample(sampler, problem.posterior, 2, seed=2).chains.states is None


@pytest.mark.parametrize("steps", [2, 9, 31, 33, 100])
def test_a_long_level_is_thinned_and_its_moments_are_of_all_steps(generator, steps):
    states = autoregressive(generator, 3, steps, (2, 2), 0.5)
    recorder = ChainRecorder(steps, keep_states=True)
    for state in states.unbind(1):
        recorder.add(state)
    found, all_steps = recorder.result(), ChainMoments.of(states)
    assert torch.allclose(found.mean, all_steps.mean)
    assert torch.allclose(found.variance, all_steps.variance)
    assert MOST_STATES / 2 <= found.states.shape[1] <= MOST_STATES or steps <= MOST_STATES
    assert torch.equal(found.states[:, -1], states[:, -1])
    assert (found.halves is None) == (steps < 10)


def test_draws_that_are_independent_or_share_ancestors_have_no_rhat():
    problem = gaussian_problem((8, 8), 1, 2, 4, 0.05)
    for sampler in (ReverseDiffusion(steps=5), TemperedSMC(diffusion_steps=3, draws=1, levels=2, moves=2)):
        result = sample(sampler, problem.posterior, 4)
        assert result.chains is None
        found = slice_diagnostics(result, everywhere(result))
        assert set(found.maps) == {"mcse_mean", "mcse_std"}
        assert set(found.numbers) == {"mcse_std_relative"}


# Monte-Carlo errors are the errors that repetition shows

PIXELS = (64, 64)
"""Replicates: a standard deviation over 4096 of them is known to ``1/sqrt(2 * 4096)`` = 1.1 %."""


@pytest.mark.parametrize("level", [0.0, 20.0], ids=["Rayleigh", "nearly normal"])
@pytest.mark.parametrize("n", [8, 16])
def test_monte_carlo_errors_of_chains(generator, n, level):
    result = drawn(level + autoregressive(generator, n, 20, PIXELS, 0.5))
    maps = slice_diagnostics(result, everywhere(result)).maps
    shown = {"mcse_mean": result.images.abs().mean(0), "mcse_std": result.images.abs().std(0)}
    for name, value in shown.items():
        # Estimates per pixel vary by some 15 %, which shrinks their root mean square's error to nothing. What is left:
        # repetition's own 1.1 %, four times; and fourth moments of few effective draws, which fall short by some
        # 6/(n * 20/3) of the kurtosis: 2 to 4 % of the error of the standard deviation.
        assert float(maps[name].square().mean().sqrt() / value.std()) == pytest.approx(1, abs=0.045 + 0.03)
    assert float(maps["mcse_std"].std() / maps["mcse_std"].mean()) < 0.25


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_monte_carlo_errors_of_independent_draws(generator, n):
    result = drawn(20 + white(generator, n, 1, *PIXELS), chains=False)
    maps = slice_diagnostics(result, everywhere(result)).maps
    shown = {"mcse_mean": result.images.abs().mean(0), "mcse_std": result.images.abs().std(0)}
    ratio = {name: float(maps[name].square().mean().sqrt() / value.std()) for name, value in shown.items()}
    assert ratio["mcse_mean"] == pytest.approx(1, abs=0.045)
    # The standard deviation of s is sqrt(1 - c4^2); two draws have the normal formula, others the cautious jackknife.
    assert 0.955 < ratio["mcse_std"] < (1.3 if n < 8 else 1.045 + 0.8 / n)


def test_the_error_is_that_of_all_states_pooled(generator):
    """Skewed chains in places of their own: the fourth moment about the common mean needs every lower one of each."""
    states = autoregressive(generator, 5, 12, (2, 2), 0.5).abs() ** 2 + torch.arange(5.0)[:, None, None, None]
    _, relative = relative_error(drawn(states + 0j))
    kurtosis = torch.from_numpy(stats.kurtosis(states.flatten(0, 1).numpy(), axis=0))  # over that of normal draws
    torch.testing.assert_close(relative, ((kurtosis / 5 + 2 / 4) / 4).sqrt())


def test_the_relative_error_of_normal_draws_is_the_textbooks(generator):
    result = drawn(20 + autoregressive(generator, 8, 40, PIXELS, 0.0))
    _, relative = relative_error(result)
    # 320 draws know the kurtosis of 3 to 0.27, which shifts sqrt(k4/8 + 2/7)/2 by 6 %; 4096 pixels leave 0.1 %. Its
    # bias, -6/320, shifts by 0.5 %.
    assert float(relative.mean()) == pytest.approx(1 / math.sqrt(2 * 7), rel=0.015)


def test_heavy_tails_have_larger_errors(generator):
    """One draw in ten is three times as far out: the spread of 8 of them is known worse than that of normal ones."""
    far = torch.where(torch.rand(8, 40, *PIXELS, generator=generator) < 0.1, 3.0, 1.0)
    result = drawn(100 + far * autoregressive(generator, 8, 40, PIXELS, 0.0))
    std, relative = relative_error(result)
    shown = float(result.images.abs().std(0).std())
    normal = 1.34 / math.sqrt(2 * 7)  # of the variance 0.9 + 0.1 * 9
    assert shown > 1.3 * normal
    # The error of a square root as half that of its square is too large where the latter is not small: cautious.
    assert 1.0 < float((std * relative).square().mean().sqrt()) / shown < 1.35


def test_errors_of_the_samplers_own_chains():
    """64 chains as 8 groups of 8: groups differ by what each predicts of itself."""
    result = sample(AnnealedLangevin(), gaussian_problem((16, 16), 1, 2, 4, 0.03).posterior, 64, seed=3)
    predicted, shown = [], []
    for group in range(8):
        pick = slice(8 * group, 8 * group + 8)
        chains = result.chains
        # Halves are not used by the errors, and cannot be cut: their autocovariance is an average over all chains.
        part = ChainMoments(chains.mean[pick], chains.variance[pick], chains.steps, None, chains.magnitude[pick])
        std, relative = relative_error(PosteriorSamples(result.images[pick], 0, [], chains=part))
        predicted.append(std * relative)
        shown.append(result.images[pick].abs().std(0))
    ratio = torch.stack(predicted).square().mean() / torch.stack(shown).var(0).mean()
    # 7 differences in each of 256 pixels that are correlated over some 3 x 3: 200 degrees of freedom, so 10 %.
    assert float(ratio) == pytest.approx(1, abs=0.3)


def test_one_sample_has_no_error():
    with pytest.raises(ValueError, match="at least two"):
        relative_error(PosteriorSamples(torch.zeros(1, 2, 2) + 0j, 0, []))


# Stuck chains


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_right_chains_are_called_stuck_as_rarely_as_promised(generator, n):
    """Per pixel; that bounds the rate per image by `FALSE_ALARM` (Markov's inequality)."""
    means = white(generator, n, 2, 300, 300)
    halves = HalfChains(means, torch.ones(10, 300, 300))
    share = stuck_share(ChainMoments(means.mean(1), halves.autocovariance, 20, halves))
    promised = FALSE_ALARM * WORRYING_SHARE
    assert share <= promised + 4 * math.sqrt(promised / 300**2)


@pytest.mark.parametrize("n", [4, 8])
def test_chains_that_forget_within_the_level_are_not_called_stuck(generator, n):
    """The correlation of a Leimkuhler-Matthews chain with h = 1 on its worst direction: 1/2 from step to step."""
    chains = ChainMoments.of(autoregressive(generator, n, 20, (50, 50), 0.5))
    assert stuck_share(chains) < WORRYING_SHARE / 5


@pytest.mark.parametrize("fault", ["modes", "frozen", "frozen alike", "slow"])
def test_stuck_chains_are_named(generator, fault):
    states = 5 + autoregressive(generator, 8, 20, (20, 20), 0.5)
    modes = torch.randint(2, (8,), generator=generator).double()
    assert 0 < modes.sum() < 8
    if fault == "modes":
        states = states + 4 * modes[:, None, None, None]
    elif fault == "frozen":
        states = states[:, :1].expand_as(states)
    elif fault == "frozen alike":
        states = states[:1, :1].expand_as(states)
    else:
        states = autoregressive(generator, 8, 20, (20, 20), 0.999)
    result = drawn(states.to(torch.complex64))
    found = slice_diagnostics(result, everywhere(result)).numbers
    assert found["stuck_share"] > 0.5
    assert any(line.startswith("chains are stuck in ") for line in chain_faults(found))


def test_a_fault_in_few_pixels_is_no_alarm():
    assert chain_faults({"disagreeing_share": WORRYING_SHARE, "stuck_share": WORRYING_SHARE}) == []
    assert chain_faults({}) == []


# Regions


def test_a_region_shows_what_its_pixels_hide(generator):
    """Offsets of a quarter of a pixel's spread per chain: invisible in one pixel, ten times a region mean's spread."""
    offsets = torch.tensor([-0.25, 0.25] * 4)[:, None, None, None]
    states = (20 + offsets + autoregressive(generator, 8, 40, (40, 40), 0.3)).numpy()
    mask = np.zeros((40, 40), dtype=bool)
    mask[4:36, 4:36] = True
    result = drawn(torch.from_numpy(states))
    assert float(rhat(result.chains).mean()) < 1.1
    report = region_report(result.images.numpy(), mask, states)
    assert report.rhat > 1.5
    assert report.ess < 30
    right = region_report(result.images.numpy(), mask, states - offsets.numpy())
    assert right.rhat < 1.1
    assert right.ess > 60


def test_the_error_of_a_regions_mean_is_what_repetition_shows(generator):
    mask = np.ones((2, 3), dtype=bool)
    reports, plain = [], []
    for _ in range(100):
        states = (20 + autoregressive(generator, 8, 20, (2, 3), 0.5)).numpy()
        reports.append(region_report(states[:, -1], mask, states))
        plain.append(region_report(states[:, -1], mask))
    for found in (reports, plain):
        # Repetition knows a standard deviation to 1/sqrt(200) = 7 %; the estimates' mean square is known better. Of the
        # jackknife 9 % are caution.
        for value, error, slack in (("mean", "mcse_mean", 0.0), ("std", "mcse_std", 0.1)):
            shown = np.std([getattr(r, value) for r in found], ddof=1)
            predicted = np.mean([getattr(r, error) ** 2 for r in found]) ** 0.5
            assert predicted / shown == pytest.approx(1, abs=0.22 + slack)
    assert np.var([r.mcse_std for r in reports]) < np.var([r.mcse_std for r in plain]), (
        "chains know their spread better"
    )
    assert plain[0].rhat is None and plain[0].ess is None
    assert plain[0].n_samples == 8


def test_regions_that_are_none(generator):
    images = white(generator, 4, 6, 5).numpy()
    with pytest.raises(ValueError, match="some pixels of two images"):
        region_report(images, np.zeros((6, 5), dtype=bool))
    with pytest.raises(ValueError, match="some pixels of two images"):
        region_report(images, np.ones((5, 6), dtype=bool))
    with pytest.raises(ValueError, match="at least ten"):
        region_report(images, np.ones((6, 5), dtype=bool), np.ones((4, 3, 6, 5)) + 0j)
