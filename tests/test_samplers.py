"""What every sampler promises besides the right law: reproducible, independent samples, honest counts, clear
failures.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from mri_posterior.exact import gaussian_problem
from mri_posterior.posterior import GaussianTerm, Posterior
from mri_posterior.samplers import SAMPLERS, SamplingFailed, sample
from mri_posterior.samplers.budget import budgeted
from mri_posterior.samplers.schedules import annealing_levels, diffusion_levels


@pytest.fixture(params=sorted(SAMPLERS))
def sampler(request):
    return budgeted(request.param, 20)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return gaussian_problem((10, 8), 2, 3, 4, 0.03).posterior


def test_table_names_are_the_dataclasses_own():
    for name, cls in SAMPLERS.items():
        assert cls().name == name
        assert dataclasses.is_dataclass(cls)
        with pytest.raises(dataclasses.FrozenInstanceError):
            cls().sigma_min = 1.0


def test_a_sample_depends_on_its_seed_alone(sampler, posterior):
    if sampler.name == "tempered_smc":
        pytest.skip("its particles interact by design: the batch is one population")
    together = sample(sampler, posterior, 4, seed=3, key=("volume", 7))
    alone = [sample(sampler, posterior, 1, seed=3, key=("volume", 7), first=i).images[0] for i in range(4)]
    # Rounding of batched linear algebra in double precision, contracted by the dynamics.
    assert torch.allclose(together.images, torch.stack(alone), atol=1e-9)
    again = sample(sampler, posterior, 4, seed=3, key=("volume", 7))
    assert torch.equal(together.images, again.images)
    assert together.seeds == again.seeds


@pytest.mark.parametrize("other", [{"seed": 4}, {"key": ("volume", 8)}, {"first": 1}])
def test_other_seeds_slices_and_indices_give_other_samples(sampler, posterior, other):
    settings = {"seed": 3, "key": ("volume", 7)}
    a, b = (sample(sampler, posterior, 1, **settings | extra).images for extra in ({}, other))
    assert (a - b).abs().mean() > 1e-3


def test_global_random_state_is_not_touched(sampler, posterior):
    before = torch.random.get_rng_state()
    sample(sampler, posterior, 1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_evaluations_are_counted_and_steps_recorded(sampler, posterior):
    calls = []

    def prior(x, sigma):
        calls.append(len(x))
        return posterior.prior(x, sigma)

    counted = Posterior(prior, posterior.operator, posterior.kspace, posterior.noise_std)
    progress = []
    result = sample(sampler, counted, 3, progress=lambda done, total: progress.append((done, total)))
    assert result.n_evaluations == len(calls)
    assert set(calls) == {3}
    assert len(result.records) == len(progress) == progress[-1][0] == progress[-1][1]
    assert result.sigma_min == sampler.sigma_min
    assert not result.images.requires_grad


def test_divergence_is_reported_not_returned(sampler, posterior):
    broken = Posterior(lambda x, sigma: x * float("nan"), posterior.operator, posterior.kspace, posterior.noise_std)
    with pytest.raises(SamplingFailed, match="diverged"):
        sample(sampler, broken, 1)


def test_algorithm_2_asks_for_its_observation(posterior):
    with pytest.raises(ValueError, match="exactly one Gaussian term"):
        sample(SAMPLERS["annealed_langevin"](algorithm=2), posterior, 1)


def test_a_warm_start_is_used(posterior):
    settings = SAMPLERS["annealed_langevin"](diffusion_steps=1, guided_steps=1, levels=1, final_steps=0, sigma_ws=0.05)
    zeros = torch.zeros(posterior.operator.shape, dtype=torch.complex128)
    a, b = (sample(settings, posterior, 1, warm_start=zeros + value).images for value in (0.0, 0.5))
    assert (a - b).abs().mean() > 1e-3


def test_posterior_refuses_what_cannot_be(posterior):
    with pytest.raises(ValueError, match="noise_std"):
        Posterior(posterior.prior, posterior.operator, posterior.kspace, 0.0)
    with pytest.raises(ValueError, match="does not fit"):
        Posterior(posterior.prior, posterior.operator, posterior.kspace[:1], 0.1)


def test_score_is_the_gradient_of_the_log_target(posterior):
    """Prior, likelihood at a level and Gaussian term together, against autograd of the log density."""
    term = GaussianTerm(torch.ones(posterior.operator.shape, dtype=torch.complex128), 0.3)
    target, sigma, eta = posterior.with_term(term), 0.2, 0.1
    spectrum = posterior.prior.spectrum
    x = torch.full((2, *posterior.operator.shape), 0.4 - 0.2j, dtype=torch.complex128, requires_grad=True)
    modes = torch.fft.fft2(x, norm="ortho")
    log_density = -(modes.abs().square() / (2 * (spectrum + sigma**2))).sum()
    residual = posterior.operator.mask * posterior.kspace - posterior.operator.forward(x)
    log_density = log_density - residual.abs().square().sum() / (2 * eta**2)
    log_density = log_density - (x - term.mean).abs().square().sum() / (2 * term.std**2)
    (gradient,) = torch.autograd.grad(log_density, x)
    score = target.score(x.detach(), sigma, posterior.operator.adjoint(posterior.kspace), eta)
    assert torch.allclose(score, gradient, atol=1e-9)


@pytest.mark.parametrize("levels", [5, 12, 40])
def test_annealing_schedule_is_admissible(levels):
    etas = annealing_levels(0.4, 0.01, levels)
    precisions = [1 / eta**2 for eta in etas]
    assert etas[0] == pytest.approx(0.4)
    assert etas[-1] == 0.01
    assert len(etas) <= levels
    ratios = [b / a for a, b in pairwise(precisions)]
    assert all(ratio > 1 for ratio in ratios)
    if levels >= 12:  # 1600 = 2^10.6: fewer levels cannot but more than double
        assert max(ratios) <= 2 + 1e-9
    if levels == 40:
        steps = [b - a for a, b in pairwise(precisions)]
        assert steps[-2] == pytest.approx(max(steps), rel=1e-6), "equal amounts of precision at small noise"


def test_annealing_of_a_measurement_noisier_than_the_start_is_one_level():
    assert annealing_levels(0.1, 0.3, 10) == [0.3]


def test_diffusion_levels_are_geometric():
    levels = diffusion_levels(4.0, 0.25, 4)
    assert levels == pytest.approx([4, 2, 1, 0.5, 0.25])
    assert diffusion_levels(0.1, 0.2, 4) == [0.2]
