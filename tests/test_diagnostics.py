"""R-hat of the last level's chains: quiet where chains agree, loud where they keep modes of their own."""

from __future__ import annotations

import pytest
import torch

from mri_posterior.diagnostics import DISAGREE, disagreeing_share, rhat
from mri_posterior.exact import gaussian_problem, mixture_problem
from mri_posterior.posterior import ChainMoments, join_batches
from mri_posterior.samplers import AnnealedLangevin, ReverseDiffusion, sample


def test_rhat_of_chains_whose_moments_are_known(generator):
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


def test_chains_of_one_mode_agree_and_of_several_do_not():
    one = sample(AnnealedLangevin(), gaussian_problem((16, 16), 2, 3, 4, 0.03).posterior, 8, seed=1)
    # Under agreement B/W is near (1 + 2 * 1/2) / 11 times a chi-squared of 14 degrees over 14: 1.34 is 7 times that.
    assert disagreeing_share(one.chains) == 0
    several = sample(AnnealedLangevin(), mixture_problem(5).posterior, 8, seed=1)
    assert disagreeing_share(several.chains) > 0.1
    assert float(rhat(several.chains).max()) > DISAGREE


def test_moments_are_those_of_the_last_level_and_join_over_batches():
    problem = gaussian_problem((8, 8), 1, 2, 4, 0.05)
    sampler = AnnealedLangevin(final_steps=4)
    whole = sample(sampler, problem.posterior, 4, seed=2)
    parts = [sample(sampler, problem.posterior, 2, seed=2, first=first) for first in (0, 2)]
    assert whole.chains.steps == 5
    joined = join_batches(parts)
    assert torch.allclose(joined.chains.mean, whole.chains.mean)
    assert torch.allclose(joined.chains.variance, whole.chains.variance)
    assert joined.seeds == whole.seeds
    assert torch.allclose(joined.images, whole.images)


def test_draws_that_are_independent_by_design_have_no_rhat():
    problem = gaussian_problem((8, 8), 1, 2, 4, 0.05)
    assert sample(ReverseDiffusion(steps=5), problem.posterior, 2).chains is None
    with pytest.raises(ValueError, match="at least two"):
        rhat(ChainMoments(torch.zeros(1, 2, 2) + 0j, torch.ones(1, 2, 2), 3))
