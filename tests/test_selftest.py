"""The self-test against the dense closed form, against right and wrong samplers, and as a command.

False alarms. Limits are quantiles at `FALSE_ALARM` = 1e-3 over all checks; draws are seeded, so that a test passes or
fails for good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import stats

from mri_posterior import cli, gaussian_reference, sampler_selftest, selftest
from mri_posterior.config import PriorConfig, ReconstructionConfig
from mri_posterior.exact import GaussianProblem, coil_maps, line_mask
from mri_posterior.gaussian_reference import PARTS, GaussianReference, prior_spectrum
from mri_posterior.posterior import Posterior
from mri_posterior.priors import GaussianPrior, NetworkConfig, NetworkPrior
from mri_posterior.sampler_selftest import RIGHT, check_sampler, explain, format_table
from mri_posterior.samplers import SAMPLERS, AnnealedLangevin, SamplingFailed
from mri_posterior.slices import MultiCoilSlice
from tests.test_commands import write_config, write_volume

SHAPE, NOISE = (20, 20), 0.03
SAMPLES = 32


def measured(shape: tuple[int, int] = SHAPE, n_coils: int = 3) -> MultiCoilSlice:
    """A slice whose k-space says nothing: the self-test brings its own."""
    maps = coil_maps(n_coils, shape, torch.complex64)
    empty = torch.full((n_coils, *shape), torch.nan, dtype=torch.complex64)
    return MultiCoilSlice(empty, line_mask(shape, 3, 4), maps, NOISE, 1.0, torch.ones(shape, dtype=torch.complex64))


def configured(sampler, samples: int = SAMPLES) -> ReconstructionConfig:
    return ReconstructionConfig(
        prior=PriorConfig("none"), sampler=sampler, samples=samples, batch=samples, device="cpu", warm_start="cg_sense"
    )


@dataclass(frozen=True)
class WrongNoise(AnnealedLangevin):
    """A right sampler that is told a wrong noise level."""

    factor: float = 1.1

    def start(self, posterior, streams, warm_start):
        return super().start(self.told(posterior), streams, warm_start)

    def plan(self, posterior):
        return super().plan(self.told(posterior))

    def told(self, posterior: Posterior) -> Posterior:
        return replace(posterior, noise_std=self.factor * posterior.noise_std)


def failing(figure: str, result: sampler_selftest.SelfTest) -> dict[str, float]:
    return {check.part: check.value for check in result.checks if check.figure == figure and not check.passed}


# The reference


def test_mean_and_draws_are_those_of_the_dense_closed_form():
    reference = GaussianReference.simulate(measured((8, 10)), 0.02, seed=1)
    problem = GaussianProblem(
        Posterior(
            GaussianPrior(spectrum=prior_spectrum((8, 10))), reference.operator, reference.kspace, reference.noise_std
        ),
        prior_spectrum((8, 10)),
        reference.mean,
    )
    mean, covariance = problem.exact(0.02)
    factor = torch.linalg.cholesky(covariance)

    def whiten(offsets: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(factor, offsets.T, upper=False).T

    assert float(whiten((reference.mean.flatten() - mean)[None]).abs().max()) < 1e-6
    n, p = 300, 80
    unit = whiten(reference.draws(n, seed=2).flatten(1))
    # Per direction n complex unit normals: relative standard deviation of a variance 1/sqrt(n), largest of 80 below 5.
    variance = unit.abs().square().mean(0) / 2
    assert float((variance - 1).abs().max()) < 5 / math.sqrt(n)
    assert float(variance.mean()) == pytest.approx(1, abs=5 / math.sqrt(n * p))
    # |covariance| of different directions: 2 * Rayleigh / sqrt(n), whose largest of 80^2 / 2 stays below 2 * 4.5.
    cross = (unit.mH @ unit / n).fill_diagonal_(0)
    assert float(cross.abs().max()) < 2 * 4.5 / math.sqrt(n)


def test_the_simulated_image_is_like_a_slice_in_normalised_units():
    spectrum = prior_spectrum((120, 96))
    assert float(spectrum.mean()) == pytest.approx(0.4**2 / 2)
    assert float(spectrum[0, 0]) == float(spectrum.max())
    assert float(spectrum[5, 0] / spectrum[10, 0]) == pytest.approx(8, rel=0.1), "falls with the third power"


class Pooled(GaussianReference):
    """A reference whose draws were all made at once: `seed` counts the sets."""

    def fill(self, sets: int, n: int) -> None:
        self.pool = super().draws(sets * n, 4).reshape(sets, n, *self.operator.shape)

    def draws(self, n: int, seed: int) -> torch.Tensor:
        return self.pool[seed][:n]


def test_figures_of_exact_draws_scatter_by_their_standard_errors_and_stay_within_quantiles(monkeypatch):
    """The Monte-Carlo errors and limits claimed, over replicates, in every part.

    Without slack and at a false-alarm rate of 0.1 per check, each fails in 0.1 of the replicates, within 4 binomial
    standard deviations and 0.02 for Satterthwaite's law. The standard deviation of R values of excess kurtosis k is
    known to ``sqrt((k + 2) / 4R)``: 4 of those, and 5 % for an expectation known from few draws.
    """
    monkeypatch.setattr(gaussian_reference, "FALSE_ALARM", 0.1 * (2 * len(PARTS) + 2))
    monkeypatch.setattr(gaussian_reference, "SPREAD_SLACK", 0.0)
    monkeypatch.setattr(gaussian_reference, "BIAS_SLACK", 0.0)
    reference = Pooled.simulate(measured((10, 12), 2), 0.02, seed=3)
    n, replicates = 8, 400
    reference.fill(replicates, 3 * n)
    runs = [reference.judge(reference.mean + reference.pool[r, 2 * n :], seed=r) for r in range(replicates)]
    for checks in zip(*runs, strict=True):
        name = f"{checks[0].figure} {checks[0].part}"
        values, expected, error = (
            np.array([getattr(check, key) for check in checks]) for key in ("value", "expected", "standard_error")
        )
        z = (values - expected) / error
        assert abs(z.mean()) < 4 / math.sqrt(replicates) + 0.05, name  # the root of a variance is a little low
        assert z.std() == pytest.approx(1, abs=4 * math.sqrt((stats.kurtosis(z) + 2) / 4 / replicates) + 0.05), name
        wrong = np.mean([not check.passed for check in checks])
        assert wrong == pytest.approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / replicates) + 0.02), name


def test_the_misfits_cross_term_has_the_variance_claimed():
    """That of ``2 Re <K^-1 m, d>`` over exact draws d, known to ``sqrt(2 / n)`` of it: five of those."""
    reference = GaussianReference.simulate(measured((10, 12), 2), 0.02, seed=3)
    pull = torch.fft.ifft2(torch.fft.fft2(reference.mean) / reference.variance)
    cross = 2 * (pull.conj() * reference.draws(600, seed=4)).real.sum(dim=(-2, -1))
    assert float(cross.square().mean()) == pytest.approx(reference._cross_variance, rel=5 * math.sqrt(2 / 600))


def test_slack_is_what_half_a_percent_of_coverage_allows():
    z = stats.norm.ppf(0.95)

    def coverage(spread: float = 1.0, bias: float = 0.0) -> float:
        return stats.norm.cdf(z * spread - bias) - stats.norm.cdf(-z * spread - bias)

    assert coverage(spread=1 + gaussian_reference.SPREAD_SLACK) - 0.9 == pytest.approx(0.005, rel=0.05)
    assert 0.9 - coverage(bias=math.sqrt(gaussian_reference.BIAS_SLACK)) == pytest.approx(0.005, rel=0.05)


# Samplers


def test_the_default_sampler_is_right():
    result = check_sampler(configured(AnnealedLangevin()), measured())
    assert result.passed, format_table(result.checks)
    assert result.verdict == RIGHT
    assert result.n_evaluations == 50
    assert len(result.checks) == 2 * len(PARTS) + 2
    assert "WRONG" not in format_table(result.checks)


@pytest.mark.parametrize(("factor", "word"), [(1.15, "high"), (0.85, "low")])
def test_a_wrong_noise_level_is_named(factor, word):
    result = check_sampler(configured(WrongNoise(factor=factor), 40), measured())
    assert not result.passed
    assert "where the data speak" in failing("spread", result)
    assert f"noise level is too {word}" in result.verdict
    assert failing("data χ²/dof", result)


def test_euler_steps_are_named_with_their_known_inflation():
    """Standard deviations ``sqrt(2/(2 - h))`` times too large, 1.41 at h = 1."""
    result = check_sampler(configured(AnnealedLangevin(kernel="ula", h=1.0)), measured())
    assert result.checks[0].value == pytest.approx(math.sqrt(2), abs=0.05)
    assert set(failing("spread", result)) >= {"everywhere", "where the data speak", "where the prior speaks"}
    assert "1.4" in result.verdict and "everywhere" in result.verdict and "Euler" in result.verdict
    assert not failing("bias", result), "its mean is right, and told apart from its spread"


@pytest.mark.parametrize("sampler", [SAMPLERS["dps"](steps=50), SAMPLERS["preconditioned_ula"](levels=15)])
def test_peers_that_do_not_sample_the_posterior_fail(sampler):
    result = check_sampler(configured(sampler), measured())
    assert not result.passed
    assert failing("spread", result)
    assert result.verdict.startswith("sampler wrong here, because the samples scatter")


def test_a_shifted_mean_is_told_in_standard_deviations():
    reference = GaussianReference.simulate(measured((10, 12), 2), 0.02, seed=5)
    draws = reference.draws(30, seed=6)
    # A shift by an exact draw is one standard deviation everywhere; half of it, half of one.
    checks = reference.judge(reference.mean + draws + 0.5 * reference.draws(1, seed=7), seed=8)
    failed = {check.part: check for check in checks if check.figure == "bias" and not check.passed}
    # q(e) over 240 directions is known to sqrt(2/240) of it, and its cross-term with the mean of the draws to more.
    assert failed["everywhere"].bias == pytest.approx(0.5, rel=0.25)
    assert all(check.passed for check in checks if check.figure == "spread")
    assert "the samples' mean is 0.5" in explain(checks)


def test_samples_that_are_all_alike_fail():
    reference = GaussianReference.simulate(measured((10, 12), 2), 0.02, seed=9)
    checks = reference.judge(reference.mean + reference.draws(1, seed=10).expand(8, -1, -1), seed=11)
    assert not any(check.passed for check in checks if check.figure == "spread")
    assert "0.00 times" in explain(checks)


def test_a_sampler_that_gives_up_is_wrong(monkeypatch):
    def diverge(*_):
        raise SamplingFailed("annealed_langevin diverged in langevin level 3: lower sampler.h")

    monkeypatch.setattr(sampler_selftest, "reconstruct_slice", diverge)
    result = check_sampler(configured(AnnealedLangevin(), 4), measured())
    assert not result.passed
    assert result.verdict == f"sampler wrong here, because {result.failure}"
    assert "level 3" in result.verdict


# The command


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration, and the volume and prior that it names."""
    folder = tmp_path_factory.mktemp("selftest")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        NetworkPrior(NetworkConfig(channels=(8, 8))).save(folder / "prior", "random weights, for tests")
    volume = write_volume(folder / "scan.h5")
    return write_config(folder / "mine.yaml", folder / "prior", volume, folder / "out")


def test_the_command_judges_the_middle_slice_and_its_exit_code_says_how(config, capsys):
    arguments = ["--config", str(config), "--samples", "8", "--set", "sampler.sigma_min=0.05"]
    assert cli.run(selftest.main, [*arguments, "--set", "sampler.final_steps=10"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("scan, slice 1: 32x32, 4 coils, ")
    assert out.rstrip().endswith(RIGHT)
    assert cli.run(selftest.main, [*arguments, "--slice", "0", "--set", "sampler.kernel=ula"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("scan, slice 0") and "sampler wrong here, because" in out
    assert not (config.parent / "out").exists(), "it writes nothing"


def test_the_command_checks_what_the_user_gave(config, capsys):
    assert cli.run(selftest.main, ["--config", str(config), "--slice", "7"]) == 2
    assert "no slice 7" in capsys.readouterr().err
    assert cli.run(selftest.main, ["--config", str(config), "--dry-run"]) == 0
    assert "spread" not in capsys.readouterr().out
