"""Samplers judged with the learned prior, and the judge itself judged with a prior whose posterior is known.

False alarms. A verdict's p-value is a Bonferroni bound over ranks (Holm over functionals) and TARP: a right sampler
falls below 0.01 in at most one of a hundred seeds. Seeds are fixed, so a test passes or fails for good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks import learned_prior_calibration as benchmark
from benchmarks.learned_prior_calibration import judge, main, replicates, report, samplers
from mri_posterior.exact import GaussianProblem, power_law
from mri_posterior.priors import GaussianPrior, load_prior
from mri_posterior.samplers import SAMPLERS
from mri_posterior.samplers.step import State, Step

SIGMA_MIN = 0.02


@dataclass(frozen=True)
class Oracle:
    """Exact draws of a Gaussian posterior, their deviations from its mean scaled by `spread`."""

    spread: float = 1.0
    name: str = "oracle"
    sigma_min: float = SIGMA_MIN

    def plan(self, posterior):
        return [Step("exact", 0, self.sigma_min)]

    def start(self, posterior, streams, warm_start):
        return State(posterior, torch.zeros(len(streams), *posterior.operator.shape, dtype=posterior.operator.dtype))

    def step(self, streams, state, step):
        generator = torch.Generator().manual_seed(int(2**62 * float(streams.uniform()[0])))
        problem = GaussianProblem(state.posterior, power_law((16, 16)), state.x[0])
        exact = problem.exact_samples(len(state.x) + 200, self.sigma_min, generator)
        # The mean of 200 further draws: within 1/14 of a standard deviation, and without effect where the spread is 1.
        mean = exact[len(state.x) :].mean(0)
        return State(state.posterior, (mean + self.spread * (exact[: len(state.x)] - mean)).to(state.x.dtype))


@pytest.fixture(scope="module")
def gaussian_replicates():
    """40 replicates of 16 x 16 pixels: the fewest that the rank test takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "SIZE", 16)
        patch.setattr(benchmark, "CENTRE", 4)
        patch.setattr(benchmark, "TRUTHS_PER_PILOT", 20)
        prior = GaussianPrior(spectrum=power_law((16, 16)).float())
        yield replicates(prior, 40, SIGMA_MIN, seed=1)


def test_replicates_are_measured_as_they_say(gaussian_replicates):
    """Truths of one pilot share its central lines and nothing else; the other lines are theirs plus noise."""
    first, second, other = (gaussian_replicates[i] for i in (0, 1, 20))
    centre = slice(6, 10)
    assert torch.equal(first.posterior.kspace[..., centre], second.posterior.kspace[..., centre])
    assert not torch.equal(first.posterior.kspace[..., centre], other.posterior.kspace[..., centre])
    outer = first.posterior.operator.mask[0].clone()
    outer[centre] = False
    squares = [
        float(
            (r.posterior.operator.residual(r.truth, r.posterior.kspace)[..., outer] / benchmark.NOISE_STD)
            .abs()
            .square()
            .sum()
        )
        for r in gaussian_replicates
    ]
    # Chi-squared: two channels of coils * rows * lines entries, in 40 replicates.
    freedom = 40 * 2 * benchmark.COILS * 16 * int(outer.sum())
    assert sum(squares) == pytest.approx(freedom, abs=5 * math.sqrt(2 * freedom))


def test_truths_are_exchangeable_with_exact_samples(gaussian_replicates):
    """The reference chain of small steps has the exact law, as far as this test can see: the same as for samplers."""
    verdict = judge(Oracle(), gaussian_replicates, 15)
    assert verdict.p_value > 0.01
    assert abs(verdict.spread_skill.z) < 4
    assert abs(verdict.averaging_gain.z) < 4
    text = report("oracle", verdict)
    assert "not rejected" in text
    assert all(name in text for name in verdict.names)


@pytest.mark.parametrize("spread", [math.sqrt(4 / 3), 0.85])
def test_wrong_spread_is_rejected(gaussian_replicates, spread):
    """4/3 is Euler's inflation of the variance at step 0.5."""
    assert judge(Oracle(spread), gaussian_replicates, 15).p_value < 0.01


def test_command_refuses_unknown_samplers(capsys):
    with pytest.raises(SystemExit):
        main(["--sampler", "nobody"])
    assert "annealed_langevin" in capsys.readouterr().err


@pytest.fixture(scope="module")
def learned():
    return load_prior("brain_t1_2mm")


@pytest.mark.slow
def test_default_sampler_is_calibrated_with_the_learned_prior(learned):
    """Four minutes on one core, and one for the truths."""
    verdict = judge(samplers(SIGMA_MIN)["annealed_langevin"], replicates(learned, 200, SIGMA_MIN), 15)
    print(report("annealed_langevin", verdict))
    assert verdict.p_value > 0.01
    assert verdict.n_evaluations <= 50


@pytest.mark.slow
def test_small_steps_are_calibrated_with_the_learned_prior(learned):
    """Half the default's step, and 70 evaluations rather than 50: eight minutes on one core."""
    sampler = SAMPLERS["annealed_langevin"](sigma_min=SIGMA_MIN, h=0.5, final_steps=30)
    verdict = judge(sampler, replicates(learned, 200, SIGMA_MIN), 15)
    print(report("small steps", verdict))
    assert verdict.p_value > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["euler", "preconditioned_ula", "dps"])
def test_wrong_samplers_are_rejected_with_the_learned_prior(learned, name):
    """A fifth of the replicates and half of the samples suffice; DPS with 200 of its 1000 steps, each a longer push."""
    sampler = samplers(SIGMA_MIN)[name]
    if name == "dps":
        sampler = replace(sampler, steps=200)
    verdict = judge(sampler, replicates(learned, 40, SIGMA_MIN), 15)
    print(report(name, verdict))
    assert verdict.p_value < 0.01
