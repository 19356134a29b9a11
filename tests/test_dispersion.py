"""Faults are called by their names: injected ones are found and no other, and right samples are left alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mri_posterior.calibration import error_sums, faults, spread_skill

K, M = 50, 8
INJECTED = {
    "over-dispersed": lambda mean, noise: mean + 1.4 * noise,
    "under-dispersed": lambda mean, noise: mean + 0.7 * noise,
    # By more than a standard deviation: as error it would make the spread look much too small.
    "biased": lambda mean, noise: mean + 1.5 + noise,
}


def draw(rng: np.random.Generator, n: int, wrong: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Truths ``[n, K]`` and samples ``[n, M, K]`` of ``N(m, v)``, v another one in every replicate."""
    width = np.exp(0.2 * rng.standard_normal((n, 1, 1)))
    mean = rng.standard_normal((n, 1, K))
    truth = (mean + width * rng.standard_normal((n, 1, K)))[:, 0]
    noise = width * rng.standard_normal((n, M, K))
    return truth, mean + noise if wrong is None else INJECTED[wrong](mean, noise)


@pytest.mark.parametrize("wrong", INJECTED)
@pytest.mark.parametrize("n", [30, 100])
def test_each_fault_is_named_and_no_other(wrong, n):
    for seed in range(10):
        found = faults(error_sums(*draw(np.random.default_rng(seed), n, wrong)))
        assert len(found) == 1 and wrong in found[0]


def test_two_faults_are_both_named():
    truth, samples = draw(np.random.default_rng(0), 30, "under-dispersed")
    assert [line.split(":")[0] for line in faults(error_sums(truth, samples - 0.5))] == [
        "samples are under-dispersed",
        "samples are biased",
    ]


@pytest.mark.parametrize("bias", [0.3, -0.3])
def test_a_small_bias_is_found_too(bias):
    truth, samples = draw(np.random.default_rng(0), 100)
    (line,) = faults(error_sums(truth, samples + bias))
    assert line.endswith("high" if bias > 0 else "low")


def test_lines_say_how_much():
    sums = error_sums(*draw(np.random.default_rng(0), 400, "over-dispersed"))
    assert faults(sums) == ["samples are over-dispersed: spread is 1.4 times the error"]
    truth, samples = draw(np.random.default_rng(0), 400)
    deviation = math.sqrt(error_sums(truth, samples).variance.sum() / truth.size)
    assert faults(error_sums(truth, samples - 0.5 * deviation)) == [
        "samples are biased: their mean is 0.5 standard deviations too low"
    ]


@pytest.mark.parametrize("n", [15, 60])
def test_false_alarms_are_as_rare_as_promised(n):
    """With tolerance 0, 500 runs of right samples name a fault in a share alpha at most: binomial, 4 standard errors.

    With the tolerance that is used, in none of these runs (its boundary is several standard errors away).
    """
    rng, alpha = np.random.default_rng(5), 0.05
    runs = [error_sums(*draw(rng, n)) for _ in range(500)]
    alarms = np.mean([bool(faults(sums, 0.0, alpha)) for sums in runs])
    assert alarms <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / len(runs))
    assert not any(faults(sums) for sums in runs)


def test_slices_of_a_subject_do_not_count_as_many():
    """20 copies of each of 5 replicates tell no more than the 5 do: ungrouped, noise is called a fault."""
    rng = np.random.default_rng(7)
    copies, alone, grouped = 20, 0, 0
    for _ in range(100):
        truth, samples = draw(rng, 5)
        subject = np.repeat(np.arange(5), copies)
        sums = error_sums(truth[subject, :2], samples[subject][..., :2])
        alone += bool(faults(sums, 0.0, 0.05))
        grouped += bool(faults(sums.grouped(subject), 0.0, 0.05))
        together = sums.grouped(subject).spread_skill()
        assert together.value == pytest.approx(sums.spread_skill().value)
        assert together.value == pytest.approx(spread_skill(truth[:, :2], samples[..., :2]).value)
    assert alone > 50
    # Binomial with 0.05: 4 standard errors.
    assert grouped <= 100 * (0.05 + 4 * math.sqrt(0.05 * 0.95 / 100))


def test_a_single_replicate_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        faults(error_sums(np.zeros((1, 3)), np.zeros((1, 4, 3))))
