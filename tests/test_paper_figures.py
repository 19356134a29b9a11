"""The paper's figures: the measured against the formulas, and the command on tiny versions.

Tolerances. A variance measured from `n` normal numbers has relative standard deviation ``sqrt(2/n)``; tests allow five,
one false alarm in 10^6. Euler's finite step is no tolerance: `euler_variances` holds what it does exactly.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from benchmarks.paper import __main__ as command
from benchmarks.paper import pixels, robustness, schedule, theorem, variance_dip
from mri_posterior.samplers.schedules import annealing_levels


@pytest.fixture(scope="module")
def dip() -> variance_dip.Data:
    return variance_dip.compute(quick=True)


def test_plain_langevin_dips_as_the_formula_says(dip):
    for eta, measured in dip.plain.items():
        expected = pixels.euler_variances([eta], len(measured) - 1, dip.h)
        # States of one run are correlated, so this is at most len(measured) independent comparisons.
        assert float((torch.tensor(measured) - expected).abs().max()) < 5 * math.sqrt(2 / dip.n)


def test_euler_recursion_tends_to_the_paper_formula():
    """The recursion's error is proportional to the step: a tenth of the step, a tenth of the error."""
    errors = []
    for h in (0.02, 0.002):
        steps = round(5 / h)
        at = h * torch.arange(steps + 1, dtype=torch.float64)
        errors.append(
            float((pixels.euler_variances([0.5], steps, h) - pixels.continuous_variance(0.5, at)).abs().max())
        )
    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


def test_annealed_langevin_keeps_the_variance(dip):
    # Relative to the recursion, five standard deviations; and the recursion itself keeps what the schedule promises.
    assert float((torch.tensor(dip.annealed) - torch.tensor(dip.predicted)).abs().max()) < 5 * math.sqrt(2 / dip.n)
    assert min(dip.predicted) > 1 - pixels.largest_dip(dip.levels)
    assert min(dip.predicted) > 0.95 > 0.61 > min(dip.plain[variance_dip.ETA])


@pytest.mark.parametrize("ratio", [1.2, 2.0, 4.0])
def test_worst_dip_of_a_level(ratio):
    """The formula is attained at the mode between the levels, and bounds every other mode."""
    v, quieter = 1 / (1 + math.sqrt(ratio)), 1 / (1 + 1 / math.sqrt(ratio))
    assert pixels.worst_dip(ratio) == pytest.approx((quieter - v) / 2)
    for scale in (0.1, 0.5, 2.0, 10.0):
        etas = [scale * ratio**0.25, scale * ratio**-0.25]
        assert pixels.largest_dip(etas) < pixels.worst_dip(ratio)
    shape = (100, 200)
    measured = schedule.measured_dip(ratio, shape, seed=3)
    # The difference of two variances; Euler's finite step may add a tenth of the dip.
    error = 5 * math.sqrt(2) * math.sqrt(2 / (2 * math.prod(shape)))
    assert measured == pytest.approx(pixels.worst_dip(ratio), abs=error + 0.1 * pixels.worst_dip(ratio))


def test_schedule_never_more_than_doubles_the_precision():
    ratios = pixels.precision_ratios(annealing_levels(schedule.ETA_START, schedule.ETA, 15))
    assert max(ratios) <= 2 + 1e-9
    # Doubling first, equal amounts later.
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(ratios))
    assert max(pixels.worst_dip(r) for r in ratios) == pytest.approx(0.0858, abs=1e-4)


def test_small_score_error_traps_plain_langevin_and_not_the_annealed():
    data = robustness.compute(quick=True)
    assert data.norms[4] < 0.01 * data.score_norm, "the error must be small in L4 under p"
    broken, control = data.runs["plain, score with error"], data.runs["plain, exact score"]
    annealed = data.runs["annealed, score with error"]
    assert broken.visits == 1
    assert broken.bias > 0.5
    assert broken.variance < 0.8
    assert annealed.visits == 0
    for run in (annealed, control):
        # bias^2 is estimated from d = 1024 coordinates, each a squared normal over n = 20 less its expectation.
        assert run.bias**2 < 5 * math.sqrt(2 / 1024) / 20 + 0.003, "a relaxation by e^-3 leaves 0.05^2 of bias"
        assert run.variance == pytest.approx(2 / (2 - robustness.H), abs=5 * run.error + 0.01)


def test_score_error_norm_agrees_with_monte_carlo():
    """With an edge that draws of p do reach; then the closed-form integral can be checked by drawing."""
    generator = torch.Generator().manual_seed(1)
    d, n, edge = 1024, 4000, 1.0
    radii = torch.stack([torch.randn(d, generator=generator).square().mean() for _ in range(n)]).double()
    size = torch.where(radii < edge, 3 * (radii * d).sqrt(), 0.0)
    for order in (2, 4):
        drawn = size**order
        # Relative error of the mean, over `order` because of the root.
        relative = float(drawn.std() / drawn.mean()) / math.sqrt(n) / order
        assert robustness.error_norm(order, edge, 4.0) == pytest.approx(
            float(drawn.mean()) ** (1 / order), rel=5 * relative
        )


def test_corrupted_denoiser_gives_the_stated_score():
    small, large = (value * torch.ones(1, *robustness.SHAPE, dtype=torch.complex64) for value in (0.5, 2.0))
    prior = robustness.CorruptedPrior()
    for x, stiffness in ((small, robustness.STIFFNESS), (large, 1.0)):
        assert torch.allclose(prior(x, 1.0) - x, -stiffness * x)


def test_divergence_of_exact_draws_is_their_sampling_error():
    """Of n exact draws each real dimension contributes about 1/(2n) from its mean and 1/(4n) from its variance, which
    two dimensions share.
    """
    gaussian = theorem.problem(8)
    generator = torch.Generator().manual_seed(2)
    n = 200
    unit, _ = gaussian.whiten(gaussian.exact_samples(n, 0.1, generator), 0.1)
    # 64 directions: the relative standard deviation of their average is near sqrt(1.2/64).
    assert theorem.divergence(unit) == pytest.approx(0.75 / n, rel=5 * math.sqrt(1.2 / 64))
    assert theorem.divergence(1.2 * unit) > 5 * theorem.divergence(unit)


def test_command_writes_every_figure_and_keeps_what_it_does_not_redo(tmp_path, capsys):
    command.main(["--quick", "--output", str(tmp_path)])
    page = (tmp_path / "paper.md").read_text(encoding="utf-8")
    for name in command.MODULES:
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size < 200_000
        assert f"(figures/{name}.png)" in page
    assert "nan" not in page
    command.main(["--quick", "--output", str(tmp_path), "--only", "schedule"])
    assert (tmp_path / "paper.md").read_text(encoding="utf-8") == page, "equal seeds, equal numbers"
    assert "written" in capsys.readouterr().out
