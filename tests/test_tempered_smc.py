"""Tempered SMC: its parts, its evidence, and mode weights that Langevin chains do not find."""

from __future__ import annotations

import math

import pytest
import torch

from mri_posterior.config import PriorConfig, ReconstructionConfig
from mri_posterior.errors import UserError
from mri_posterior.exact import gaussian_problem, mixture_problem
from mri_posterior.samplers import AnnealedLangevin, TemperedSMC, sample
from mri_posterior.samplers.tempered_smc import cluster_order, largest_rise, systematic_resampling

SIGMA_MIN = 0.02


def test_systematic_resampling_draws_each_index_its_share_up_to_rounding(generator):
    weights = torch.rand(50, generator=generator, dtype=torch.float64) ** 3
    weights = weights / weights.sum()
    offsets = torch.arange(200, dtype=torch.float64) / 200
    counts = torch.stack([torch.bincount(systematic_resampling(weights, 30, float(u)), minlength=50) for u in offsets])
    assert bool((counts >= (30 * weights).floor()).all())
    assert bool((counts <= (30 * weights).ceil()).all())
    # The offsets are a midpoint-like rule for u uniform: a count changes at most twice, so its mean errs below 2/200.
    assert float((counts.double().mean(0) - 30 * weights).abs().max()) <= 2 / 200


def test_likelihood_rises_until_the_effective_sample_size_is_reached(generator):
    half_misfit = 10 * torch.rand(400, generator=generator, dtype=torch.float64)
    rise = largest_rise(half_misfit, 100.0, 0.5)
    weights = torch.softmax(-rise * half_misfit, 0)
    assert 1 / float(weights.square().sum()) / 400 == pytest.approx(0.5, abs=1e-6)
    assert largest_rise(half_misfit, rise / 2, 0.5) == rise / 2


def test_clusters_stand_together(generator):
    label = torch.randint(0, 3, (60,), generator=generator)
    images = (5.0 * label)[:, None, None] + torch.randn(60, 2, 2, generator=generator) + 0j
    changes = int((label[cluster_order(images)].diff() != 0).sum())
    assert changes == 2


def test_gaussian_posterior_and_evidence():
    """One mode: mean, variance and evidence of the closed form.

    The particles' variance has standard deviation ``1/sqrt(p n)`` relative (see test_exact_posterior); the log
    evidence sums over at most `levels` levels means of weights of squared coefficient of variation
    ``1/effective_size - 1 = 1`` over n or more states, of standard deviation ``sqrt(levels / n)`` together.
    """
    problem = gaussian_problem((8, 8), 1, 4, 2, 0.3)
    sampler, n = TemperedSMC(sigma_min=SIGMA_MIN, levels=24, moves=6), 300
    result = sample(sampler, problem.posterior, n, seed=3)
    unit, _ = problem.whiten(result.images, SIGMA_MIN)
    # Resampled particles share ancestors until the moves have parted them: 1 % for what is left of that.
    assert float(unit.abs().square().mean()) / 2 == pytest.approx(1, abs=5 / math.sqrt(64 * n) + 0.01)
    bias = n * float(unit.mean(0).abs().square().sum())
    assert abs(bias - 2 * 64) < 5 * math.sqrt(4 * 64) + 0.02 * 2 * 64
    # E_p exp(-|y - A x|^2 / 2 eta^2) for p Gaussian of mean 0, in Fourier space, where one coil is diagonal.
    prior = torch.fft.fftshift(problem.spectrum) + SIGMA_MIN**2
    ratio = 1 + prior / 0.3**2
    y = problem.posterior.kspace[0]
    exact = -(ratio.log() + y.abs().square() / (2 * 0.3**2 * ratio))[problem.posterior.operator.mask].sum()
    assert result.report["log_evidence"] == pytest.approx(float(exact), abs=5 * math.sqrt(sampler.levels / n))
    assert result.report["tempered_eta"] == pytest.approx(0.3)
    assert result.report["effective_size"] >= 0.49
    assert result.chains is None, "particles that share ancestors agree whether they are right or not"


@pytest.mark.parametrize("modes", [2, 5])
def test_mode_weights_that_langevin_chains_do_not_find(modes):
    """Exact up to the particles' own error: a binomial share has standard deviation at most ``1/(2 sqrt n)``."""
    problem, n = mixture_problem(modes), 400
    exact = problem.exact_weights(SIGMA_MIN)
    smc = sample(TemperedSMC(sigma_min=SIGMA_MIN), problem.posterior, n, seed=1)
    assert smc.n_evaluations <= 300
    assert float((problem.weights_of(smc.images, SIGMA_MIN) - exact).abs().max()) < 4 / (2 * math.sqrt(n))
    langevin = sample(AnnealedLangevin(sigma_min=SIGMA_MIN), problem.posterior, n, seed=1)
    assert float((problem.weights_of(langevin.images, SIGMA_MIN) - exact).abs().max()) > 0.15


def test_same_seed_same_population_and_another_seed_another():
    problem = mixture_problem(2)
    sampler = TemperedSMC(draws=1, diffusion_steps=5, levels=2, moves=2)
    a, b, c = (sample(sampler, problem.posterior, 20, seed=s).images for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_reconstruct_refuses_to_split_a_population():
    with pytest.raises(UserError, match="batch"):
        ReconstructionConfig(PriorConfig("knee_phantom_1mm"), sampler=TemperedSMC(), samples=8, batch=4)
