"""Every sampler against posteriors known in closed form, at equal numbers of network evaluations.

    python -m benchmarks.exactness            # prints the tables
    python -m benchmarks.exactness --write    # and puts them into docs/exactness.md and README.md

Reading the tables. *Variance* is that of the samples whitened by the exact posterior, where the data speak (observed)
and where they do not (unobserved); ideal 1. *Bias* is chi-squared of the samples' mean over its degrees of freedom; 1
is pure Monte-Carlo error. *Coverage* is how much of the exact posterior lies within the samples' 90 % intervals.
*Distance* is sliced Wasserstein to exact samples, over that of an exact sampler; *mode error* the largest error of a
mode's weight.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.paper import style
from mri_posterior.distances import monte_carlo_floor, sliced_wasserstein
from mri_posterior.exact import (
    GaussianProblem,
    MixtureProblem,
    RingProblem,
    gaussian_problem,
    mixture_problem,
    ring_problem,
)
from mri_posterior.files import atomic_path
from mri_posterior.progress import progress_view
from mri_posterior.samplers import SAMPLERS, SamplingFailed, sample
from mri_posterior.samplers.budget import budgeted

ROOT = Path(__file__).parents[1]
BUDGETS = (50, 200, 1000)
LARGEST = {"annealed_langevin": 200, "moment_matching": 200, "tempered_smc": 300}
"""Of those that have long converged, or cost a multiple of the others per evaluation."""


@dataclass(frozen=True)
class Score:
    """One line of a table: a sampler at a number of evaluations, and its figures by column."""

    sampler: str
    evaluations: int
    figures: dict[str, float]


def gaussian_score(problem: GaussianProblem, images: torch.Tensor, sigma_min: float) -> dict[str, float]:
    """Whitened variances, bias and coverage of samples of a Gaussian posterior; all but the last ideally 1."""
    unit, gain = problem.whiten(images.to(torch.complex128), sigma_min)
    variance = unit.abs().square().mean(0) / 2
    real = torch.view_as_real(unit).flatten(1).numpy()
    # In these coordinates the exact posterior is N(0, 1); of n samples, Weibull's quantiles hold 90 % on average.
    low, high = np.quantile(real, (0.05, 0.95), axis=0, method="weibull")
    held = torch.special.ndtr(torch.from_numpy(high)) - torch.special.ndtr(torch.from_numpy(low))
    return {
        "variance, observed": float(variance[gain > 1].mean()),
        "variance, unobserved": float(variance[gain <= 1].mean()),
        "bias χ²/dof": len(unit) * float(unit.mean(0).abs().square().mean()) / 2,
        "90 % coverage": float(held.mean()),
    }


def distance_score(problem: MixtureProblem | RingProblem, images: torch.Tensor, sigma_min: float) -> dict[str, float]:
    """Sliced Wasserstein over an exact sampler's own, coverage, and error of the mode weights where there are modes."""
    generator = torch.Generator().manual_seed(1)
    n, images = len(images), images.to(torch.complex128)
    reference = problem.exact_samples(20 * n, sigma_min, generator)

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return sliced_wasserstein(a, b, torch.Generator().manual_seed(2))

    def draw(n: int, generator: torch.Generator) -> torch.Tensor:
        return problem.exact_samples(n, sigma_min, generator)

    floor = float(monte_carlo_floor(distance, draw, (n, 20 * n), generator, 10).mean())
    real, truth = (torch.view_as_real(x).flatten(1).numpy() for x in (images, reference))
    low, high = np.quantile(real, (0.05, 0.95), axis=0, method="weibull")
    figures = {
        "distance / floor": distance(images, reference) / floor,
        "90 % coverage": float(np.mean((truth >= low) & (truth <= high))),
    }
    if isinstance(problem, MixtureProblem):
        error = problem.weights_of(images, sigma_min) - problem.exact_weights(sigma_min)
        figures["mode error"] = float(error.abs().max())
    return figures


@dataclass(frozen=True)
class Case:
    """A problem of the suite and its number of samples."""

    title: str
    problem: GaussianProblem | MixtureProblem | RingProblem
    samples: int

    def score(self, name: str, budget: int, seed: int = 0) -> Score:
        sampler = budgeted(name, budget)
        try:
            result = sample(sampler, self.problem.posterior, self.samples, seed=seed)
        except SamplingFailed:
            return Score(name, budget, {})
        judge = gaussian_score if isinstance(self.problem, GaussianProblem) else distance_score
        return Score(name, result.n_evaluations, judge(self.problem, result.images, sampler.sigma_min))


def cases(quick: bool = False) -> list[Case]:
    single = torch.complex64
    return [
        Case("Gaussian, 24x24, 3 coils, 3x", gaussian_problem((24, 24), 3, 3, 4, 0.03), 16 if quick else 128),
        Case("Gaussian, 64x64, 1 coil, 4x, single precision", gaussian_problem((64, 64), 1, 4, 4, 0.03, dtype=single),
             8 if quick else 64),
        Case("Two modes, 8x8, 4x", mixture_problem(2), 60 if quick else 600),
        Case("Five modes, 8x8, 4x", mixture_problem(5), 60 if quick else 600),
        Case("Eight modes, 8x8, 4x", mixture_problem(8), 60 if quick else 600),
        Case("Ring, one pixel", ring_problem(), 100 if quick else 1000),
    ]  # fmt: skip


def table(scores: Iterable[Score]) -> str:
    """A Markdown table; a sampler that diverged has dashes."""
    scores = list(scores)
    columns = next((list(s.figures) for s in scores if s.figures), [])
    rows = [
        (s.sampler, s.evaluations, *(f"{s.figures[c]:.3g}" if c in s.figures else "-" for c in columns)) for s in scores
    ]
    return style.table(("sampler", "evaluations", *columns), rows)


def summary(results: dict[str, list[Score]]) -> str:
    """The README's table: every sampler at its smallest and largest budget, the telling columns of four problems."""
    gaussian, modes, ring = (next(t for t in results if t.startswith(start)) for start in ("Gaussian", "Five", "Ring"))
    columns = [
        (gaussian, "variance, observed", "Gaussian: variance observed"),
        (gaussian, "variance, unobserved", "unobserved"),
        (gaussian, "bias χ²/dof", "bias χ²/dof"),
        (modes, "mode error", "five modes: mode error"),
        (modes, "distance / floor", "distance"),
        (ring, "distance / floor", "ring: distance"),
    ]
    rows = []
    for name in dict.fromkeys(score.sampler for score in results[gaussian]):
        runs = [i for i, score in enumerate(results[gaussian]) if score.sampler == name]
        for i in sorted({runs[0], runs[-1]}):
            cells = [f"{results[t][i].figures.get(key, float('nan')):.3g}" for t, key, _ in columns]
            rows.append((name, results[gaussian][i].evaluations, *cells))
    return style.table(("sampler", "evaluations", *(heading for *_, heading in columns)), rows)


def put_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands between ``<!-- marker -->`` and ``<!-- /marker -->`` of a file."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    old = path.read_text()
    new, found = re.subn(f"{start}.*?{end}", lambda _: f"{start}\n{text}\n{end}", old, flags=re.DOTALL)
    if found != 1:
        raise SystemExit(f"{path}: expected one {start} … {end}")
    with atomic_path(path) as temporary:
        temporary.write_text(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples and budgets: to see that it runs")
    parser.add_argument("--sampler", nargs="+", choices=sorted(SAMPLERS), help="these only")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/exactness.md and README.md")
    options = parser.parse_args()
    names = options.sampler or sorted(set(SAMPLERS) - {"reverse_diffusion"})
    budgets = BUDGETS[:1] if options.quick else BUDGETS
    suite = cases(options.quick)
    runs = [(n, b) for n in names for b in sorted({min(b, LARGEST.get(n, b)) for b in budgets})]
    results: dict[str, list[Score]] = {}
    done = 0
    with progress_view("exactness", len(suite) * len(runs)) as progress:
        for case in suite:
            scores = results[case.title] = []
            for name, budget in runs:
                scores.append(case.score(name, budget))
                done += 1
                progress(done)
            print(f"\n## {case.title}\n\n{table(scores)}", flush=True)
    if options.write:
        full = "\n\n".join(f"### {title}\n\n{table(scores)}" for title, scores in results.items())
        put_between(ROOT / "docs" / "exactness.md", "exactness", full)
        put_between(ROOT / "README.md", "exactness", summary(results))


if __name__ == "__main__":
    main()
