"""The admissible schedule, and how far each of its levels lets the variance fall."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.paper import style
from benchmarks.paper.pixels import (
    Watched,
    euler_variances,
    normal_pixels,
    normal_prior,
    plain_langevin,
    precision_ratios,
    variance,
    worst_dip,
)
from mri_posterior.samplers import sample
from mri_posterior.samplers.schedules import annealing_levels

NAME = "schedule"
TITLE = "The annealing schedule and its variance dips"
ETA_START, ETA = 10.0, 0.1
LEVELS = (8, 15, 40)


@dataclass
class Data:
    """`schedules`: levels ``eta_i`` by number of levels; `ratios`, `dips`: of one level, measured in `n` real numbers;
    `trace`, `predicted`: variance of a whole annealed run of `steps_per_level`, measured and by the recursion.
    """

    schedules: dict[int, list[float]]
    ratios: list[float]
    dips: list[float]
    n: int
    trace: list[float]
    predicted: list[float]
    trace_levels: list[float]
    steps_per_level: int


def compute(quick: bool = False) -> Data:
    shape = (100, 200) if quick else (500, 800)
    ratios = [1.2, 2.0] if quick else [1.1, 1.2, 1.5, 2.0, 3.0, 4.0]
    steps, h = (30, 0.1) if quick else (60, 0.05)
    posterior = normal_pixels(shape, ETA, seed=1, prior=Watched(normal_prior, variance, 1.0))
    levels = annealing_levels(ETA_START, ETA, 15)
    result = sample(plain_langevin(ETA_START, 15, steps, h), posterior, 1, seed=1)
    return Data(
        schedules={n: annealing_levels(ETA_START, ETA, n) for n in LEVELS},
        ratios=ratios,
        dips=[measured_dip(ratio, shape, seed=i) for i, ratio in enumerate(ratios, 2)],
        n=2 * shape[0] * shape[1],
        trace=[*posterior.prior.seen, variance(result.images)],
        predicted=euler_variances(levels, steps, h).tolist(),
        trace_levels=levels,
        steps_per_level=steps,
    )


def measured_dip(ratio: float, shape: tuple[int, int], seed: int, h: float = 0.04, steps: int = 150) -> float:
    """Fall of the variance in the second of two levels for the mode that suffers most, the one between them.

    It counts from that level's own start, where the first level has relaxed to ``e^-6``: Euler's excess variance, about
    h/4, then cancels to within a tenth of the dip.
    """
    first = ratio**0.25
    watched = Watched(normal_prior, variance, 1.0)
    posterior = normal_pixels(shape, 1 / first, seed, watched)
    sample(plain_langevin(first, 2, steps, h), posterior, 1, seed=seed)
    level = watched.seen[steps:]
    return level[0] - min(level)


def draw(data: Data, path: Path) -> None:
    figure, (levels, dips, trace) = style.panels(3)
    for (n, etas), colour, marker in zip(data.schedules.items(), style.CYCLE, style.MARKERS, strict=False):
        levels.semilogy(range(1, len(etas) + 1), etas, color=colour, marker=marker, ms=3, lw=1, label=f"{n} levels")
    style.label(levels, "Schedules from η = 10 to 0.1", "level i", "noise level η$_i$ (image units)")
    style.legend(levels)

    grid = torch.linspace(1.001, max(data.ratios) * 1.05, 100).tolist()
    dips.plot(grid, [100 * worst_dip(r) for r in grid], color=style.GREY, lw=1, label="½(√r-1)/(√r+1)")
    error = 100 * math.sqrt(2 / data.n)
    measured = [100 * d for d in data.dips]
    dips.errorbar(data.ratios, measured, error, fmt="o", ms=4, color=style.BLUE, label="measured, ±1 s.d.")
    style.label(dips, "Worst dip of one level", "r = η$_i$²/η$_{i+1}$²", "loss of variance (%)")
    style.legend(dips)

    bound = 100 * worst_dip(max(precision_ratios(data.trace_levels)))
    trace.axhline(100 - bound, color=style.RED, ls="--", lw=1, label=f"bound, {bound:.1f} % below 1")
    time = [i / data.steps_per_level for i in range(len(data.trace))]
    trace.plot(time, [100 * v for v in data.predicted], color=style.ORANGE, lw=2.5, label="exact recursion (Euler)")
    trace.plot(time, [100 * v for v in data.trace], color=style.BLUE, lw=0.8, label="measured")
    trace.set_ylim(90, 108)
    style.label(trace, f"A whole run, {len(data.trace_levels)} levels", "level", "variance (% of the prior's)")
    style.legend(trace, loc="upper right")
    style.save(figure, path)


def text(data: Data) -> str:
    rows = [
        (f"{r:g}", f"{100 * worst_dip(r):.2f} %", f"{100 * d:.2f} %")
        for r, d in zip(data.ratios, data.dips, strict=True)
    ]
    largest = {n: max(precision_ratios(etas)) for n, etas in data.schedules.items()}
    return "\n\n".join(
        [
            "*See:* precision doubles per level while the measurement is weak and grows by equal amounts once it is "
            "strong; a level whose precision grows by the factor r lets the variance of no Gaussian mode fall by more "
            f"than the curve, and the curve is reached. Within a whole run it stayed above "
            f"{100 * min(data.trace):.1f} %. "
            "Largest r: " + ", ".join(f"{r:.2f} with {n} levels" for n, r in largest.items()) + ".",
            style.table(("r", "formula", f"measured (s.d. {100 * math.sqrt(2 / data.n):.2f} %)"), rows),
        ]
    )
