"""The verdict's laws and false alarms where the model is exactly right, and each fault found.

The prior is Gaussian and samples are exact, so nothing here is a sampler's. Counts are of seeded scans; bounds are
binomial: a right verdict had a chance of 1e-3 at most to miss each before the seed was chosen.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from scipy import stats

from mri_posterior.errors import UserError
from mri_posterior.exact import coil_maps, gaussian_problem, white
from mri_posterior.operator import SenseOperator, fft2c
from mri_posterior.scan_checks import calibration_centre
from mri_posterior.slices import MultiCoilSlice
from mri_posterior.verdict import FALSE_ALARM, judge, volume_json, withhold

SHAPE, COILS, ETA, SIGMA_MIN = (24, 20), 8, 0.01, 1e-3


@cache
def setting(points: bool = False):
    """Mask, maps and the square root of the prior's spectrum: one line in two, or half of the points."""
    problem = gaussian_problem(SHAPE, COILS, 2, 4, ETA)
    mask = problem.posterior.operator.mask
    if points:
        mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[8:16, 6:14] = True
    return mask, coil_maps(COILS, SHAPE), (problem.spectrum + SIGMA_MIN**2).sqrt()


def draw_object(generator: torch.Generator) -> torch.Tensor:
    return torch.fft.ifft2(setting()[2] * torch.fft.fft2(white(generator, *SHAPE)))


def scan_of(generator: torch.Generator, points: bool = False, kspace: torch.Tensor | None = None) -> MultiCoilSlice:
    """A right scan of a draw of the prior, or of the `kspace` of all coils."""
    mask, maps, _ = setting(points)
    kspace = full_kspace(draw_object(generator)) if kspace is None else kspace
    measured = mask * (kspace + ETA * white(generator, *kspace.shape))
    return MultiCoilSlice(measured, mask, maps, ETA, 1.0, torch.ones(SHAPE, dtype=torch.complex128))


def full_kspace(image: torch.Tensor) -> torch.Tensor:
    return fft2c(setting()[1] * image)


_FACTORS: dict[bytes, tuple] = {}


def exact_samples(given: MultiCoilSlice, n: int, generator: torch.Generator) -> torch.Tensor:
    """Of the posterior that the slice's mask and noise level imply, right or wrong."""
    operator = SenseOperator(given.maps, given.mask)
    key = given.mask.numpy().tobytes() + str(given.noise_std).encode()
    if key not in _FACTORS:
        problem = gaussian_problem(SHAPE, COILS, 2, 4, ETA)
        problem.posterior = replace(problem.posterior, operator=operator, noise_std=given.noise_std)
        covariance = problem.exact(SIGMA_MIN)[1]
        _FACTORS[key] = covariance, torch.linalg.cholesky(covariance)
    covariance, root = _FACTORS[key]
    mean = covariance @ operator.adjoint(given.kspace).flatten() / given.noise_std**2
    return (mean + white(generator, n, len(mean)) @ root.T).reshape(n, *SHAPE)


def verdict_of(scan: MultiCoilSlice, generator: torch.Generator, share: float = 0.2, n: int = 4):
    given, withheld = withhold(scan, share, seed=0)
    return judge(scan, withheld, exact_samples(given, n, generator))


def others(mask: torch.Tensor, *columns: int) -> torch.Tensor:
    chosen = torch.zeros_like(mask)
    chosen[:, list(columns)] = True
    return chosen & mask & ~calibration_centre(mask)


def faulty(fault: str, generator: torch.Generator, points: bool) -> MultiCoilSlice:
    mask = setting(points)[0]
    image = draw_object(generator)
    kspace = full_kspace(image)
    outside = mask & ~calibration_centre(mask)
    if fault == "noise too low":
        return replace(scan_of(generator, points, kspace), noise_std=ETA / 2)
    if fault == "noise too high":
        return replace(scan_of(generator, points, kspace), noise_std=2 * ETA)
    if fault == "empty lines":
        return scan_of(generator, points, torch.where(others(mask, 6, 14), 0, kspace))
    if fault == "positions":
        return scan_of(generator, points, torch.where(outside, kspace.roll(1, -1), kspace))
    moved = full_kspace(image.roll((4, 3), (0, 1)))
    return scan_of(generator, points, torch.where(others(mask, 4, 6, 14), moved, kspace))


def test_residuals_and_scores_of_one_sample_follow_their_laws(generator):
    """Of one sample (thrice, so that their combination is twice its p-value) p-values are uniform below 1/2."""
    kinds: dict[tuple[str, str], list[float]] = {}
    for _ in range(150):
        scan = scan_of(generator)
        verdict = judge(scan, torch.zeros_like(scan.mask), exact_samples(scan, 1, generator).expand(3, *SHAPE))
        for check in verdict.checks:
            kinds.setdefault((check.kind, check.where), []).append(check.p_value)
    lines = sorted(where for kind, where in kinds if kind == "gain")
    asked = [[("residual", "scan")], [("residual", "band 1")], [("residual", "coil 2")], [("position", "columns")]]
    # Lines have independent noise, so their p-values can be pooled.
    asked += [[(kind, line) for line in lines] for kind in ("residual", "gain")]
    for keys in asked:
        p_values = [p for key in keys for p in kinds[key]]
        below = [p for p in p_values if p < 1]
        assert stats.binomtest(len(below), len(p_values), 0.5).pvalue > 1e-3, keys[0]
        assert stats.binomtest(sum(p < 0.1 for p in below), len(p_values), 0.05).pvalue > 1e-3, keys[0]
        assert stats.kstest(below, "uniform").pvalue > 1e-3, keys[0]


@pytest.mark.parametrize("points", [False, True], ids=["lines", "points"])
def test_a_right_model_gives_few_false_alarms(generator, points):
    verdicts = [verdict_of(scan_of(generator, points), generator) for _ in range(100)]
    significant = sum(min(check.adjusted for check in v.checks) < FALSE_ALARM for v in verdicts)
    assert significant <= stats.binom.isf(1e-3, len(verdicts), FALSE_ALARM)
    assert sum(not v.consistent for v in verdicts) <= significant
    predicted = [check.p_value for v in verdicts for check in v.checks if check.kind == "prediction"]
    assert sum(p < 0.05 for p in predicted) <= stats.binom.isf(1e-3, len(predicted), 0.05)
    coverage = torch.tensor([v.coverage for v in verdicts])
    # Scans are independent, their data are not: the error of the mean is that over scans.
    assert abs(float(coverage.mean()) - 0.9) < 4 * float(coverage.std()) / len(verdicts) ** 0.5 + 0.01


@pytest.mark.parametrize("points", [False, True], ids=["lines", "points"])
@pytest.mark.parametrize("fault", ["noise too low", "noise too high", "empty lines", "positions", "motion"])
def test_each_fault_is_found(generator, fault, points):
    verdicts = [verdict_of(faulty(fault, generator, points), generator) for _ in range(20)]
    found = [v for v in verdicts if not v.consistent]
    # Detection of 98 % finds fewer than 18 of 20 with probability 1e-3.
    assert len(found) >= 18
    named = {"motion": ("lines",), "positions": ("lines", "positions")}.get(fault, (fault,))
    assert sum(v.cause in named for v in found) > len(found) / 2
    assert all(v.line.startswith(("suspicious, because", "caution: ")) and "\n" not in v.line for v in found)


def test_the_empty_lines_are_named(generator):
    mask = setting()[0]
    kspace = torch.where(others(mask, 6), 0, full_kspace(draw_object(generator)))
    scan = scan_of(generator, kspace=kspace)
    verdict = judge(scan, torch.zeros_like(mask), exact_samples(scan, 4, generator))
    assert verdict.suspicious_lines[0] == "column 6"
    assert "column 6" in verdict.line


def test_withheld_lines_and_points_leave_the_centre(generator):
    for points in (False, True):
        scan = scan_of(generator, points)
        given, withheld = withhold(scan, 0.3, seed=4)
        assert not (withheld & calibration_centre(scan.mask)).any()
        assert torch.equal(given.mask | withheld, scan.mask)
        assert not (given.mask & withheld).any()
        assert torch.equal(given.kspace, scan.kspace * given.mask)
        assert (withheld.all(0) == withheld.any(0)).all() or points
        outside = scan.mask & ~calibration_centre(scan.mask)
        unit = outside.any(0) if not points else outside
        assert int((withheld.any(0) if not points else withheld).sum()) == max(1, round(0.3 * int(unit.sum())))
        assert not torch.equal(withheld, withhold(scan, 0.3, seed=5)[1])


def test_a_scan_of_its_centre_alone_has_nothing_to_withhold(generator):
    scan = scan_of(generator)
    with pytest.raises(UserError, match="nothing to withhold"):
        withhold(replace(scan, mask=calibration_centre(scan.mask)), 0.2, seed=0)


def test_two_samples_are_too_few(generator):
    scan = scan_of(generator)
    with pytest.raises(ValueError, match="at least three"):
        judge(scan, torch.zeros_like(scan.mask), exact_samples(scan, 2, generator))


def test_verdicts_are_json(generator):
    verdict, wrong = (verdict_of(s, generator) for s in (scan_of(generator), faulty("empty lines", generator, False)))
    written = json.loads(verdict.to_json())
    assert written["line"] == verdict.line
    assert len(written["checks"]) == len(verdict.checks)
    volume = json.loads(volume_json({4: verdict, 5: wrong}))
    assert not volume["consistent"]
    assert volume["line"] == f"{wrong.line} (slice 5)"
    assert volume["slices"]["4"]["line"] == verdict.line
    assert json.loads(volume_json({4: verdict}))["line"] == verdict.line


def test_more_slices_raise_the_bar(generator):
    scan = scan_of(generator)
    given, withheld = withhold(scan, 0.2, seed=0)
    samples = exact_samples(given, 4, generator)
    one, many = (judge(scan, withheld, samples, n_slices=n) for n in (1, 5))
    for single, shared in zip(one.checks, many.checks, strict=True):
        assert shared.adjusted == pytest.approx(min(1.0, 5 * single.adjusted))
