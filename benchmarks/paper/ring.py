"""Figures 1 and 2: from a warm start off the manifold, through its noised ball, to the posterior."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.paper import style
from mri_posterior.exact import RingProblem, ring_problem
from mri_posterior.image_operators import PixelMask
from mri_posterior.posterior import GaussianTerm, Posterior
from mri_posterior.samplers import AnnealedLangevin, sample

NAME = "ring"
TITLE = "Figures 1 and 2: a ring, a warm start off it, and the posterior"
DATA, ETA, WIDTH = 0.9 + 0.6j, 0.5, 0.05
SIGMA_MIN, SIGMA_WS = 0.1, 0.4
WARM_START, NOISED = 0.25 + 0.35j, 0.55 - 0.35j
BINS = 72


@dataclass
class Run:
    """`phases`: states by name, in order; `angles`: shares of the last phase in `BINS` equal sectors from -pi, and
    `exact`: what they should be; `distance`: their total variation distance, `expected` from sampling error alone.
    """

    title: str
    phases: dict[str, torch.Tensor]
    density: tuple[torch.Tensor, torch.Tensor]
    angles: torch.Tensor
    exact: torch.Tensor
    distance: float
    expected: float


@dataclass
class Data:
    runs: list[Run]
    n: int


def compute(quick: bool = False) -> Data:
    shape = (25, 40) if quick else (100, 200)
    return Data(list(_runs(shape)), shape[0] * shape[1])


def _runs(shape: tuple[int, int]) -> Iterator[Run]:
    # Along the ring the target is 25 times flatter than across it, and steps are limited by the latter.
    kernel = {"sigma_min": SIGMA_MIN, "precondition": "scalar", "h": 0.4, "levels": 10, "steps_per_level": 40}
    term = GaussianTerm(torch.full((1, 1), NOISED), SIGMA_WS)
    yield _run(
        "Algorithm 2: x given y and one noised observation x~",
        ring_problem(WIDTH, ETA, DATA, term),
        AnnealedLangevin(algorithm=2, diffusion_steps=40, final_steps=400, **kernel),
        shape,
        ("x~", "after reverse diffusion: p(x | x~)", "after annealed Langevin: p(x | x~, y)"),
        SIGMA_WS,
    )
    yield _run(
        "Algorithm 3, guided way down: x given y",
        ring_problem(WIDTH, ETA, DATA),
        AnnealedLangevin(algorithm=3, sigma_ws=SIGMA_WS, final_steps=400, **kernel),
        shape,
        ("x$_0$ + $\\sigma_{ws}$ n", "after the guided way down", "after annealed Langevin: p(x | y)"),
        SIGMA_WS,
    )


def _run(
    title: str,
    problem: RingProblem,
    sampler: AnnealedLangevin,
    shape: tuple[int, int],
    names: tuple[str, str, str],
    start_level: float,
) -> Run:
    """Every pixel of an image of this shape is a chain of its own; the ring's prior does not couple them."""
    states: dict[float, torch.Tensor] = {}

    def prior(x, sigma):
        states.setdefault(sigma, x.flatten())
        return problem.prior(x, sigma)

    operator = PixelMask(torch.ones(shape, dtype=torch.bool), torch.complex128)
    terms = tuple(replace(term, mean=term.mean.to(torch.complex128).expand(shape)) for term in problem.posterior.terms)
    posterior = Posterior(prior, operator, torch.full(shape, DATA, dtype=torch.complex128), ETA, terms)
    warm_start = torch.full((1, *shape), WARM_START, dtype=torch.complex128)
    final = sample(sampler, posterior, 1, seed=4, warm_start=warm_start).images.flatten()
    phases = dict(zip(names, (states[start_level], states[sampler.sigma_min], final), strict=True))
    grid, density = problem.density(sampler.sigma_min)
    exact, angles = _by_angle(grid, density), _by_angle(final, torch.full((len(final),), 1 / len(final)).double())
    distance = float((angles - exact).abs().sum()) / 2
    # A share is off by sqrt(p/n), and the mean of |normal| is sqrt(2/pi) standard deviations.
    expected = float(exact.sqrt().sum()) * math.sqrt(2 / math.pi / len(final)) / 2
    return Run(title, phases, (grid, density), angles, exact, distance, expected)


def _by_angle(points: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    sector = ((points.angle() + math.pi) / (2 * math.pi) * BINS).long().clamp(0, BINS - 1)
    return torch.zeros(BINS, dtype=torch.float64).index_add(0, sector.flatten(), weights.flatten())


def draw(data: Data, path: Path) -> None:
    figure, axes = style.panels(4, len(data.runs), width=3.2)
    circle = torch.polar(torch.ones(200), torch.linspace(0, 2 * math.pi, 200))
    for row, run in enumerate(data.runs):
        *scatters, angular = axes[4 * row : 4 * row + 4]
        for panel, (name, states) in zip(scatters, run.phases.items(), strict=True):
            shown = states[:1500]
            panel.plot(circle.real, circle.imag, color=style.GREY, lw=0.8)
            panel.scatter(shown.real, shown.imag, s=2, color=style.BLUE, alpha=0.35, lw=0, rasterized=True)
            panel.plot(DATA.real, DATA.imag, "X", color=style.RED, ms=7, label="y")
            start = NOISED if row == 0 else WARM_START
            panel.plot(start.real, start.imag, "P", color=style.ORANGE, ms=7, label="x~" if row == 0 else "x$_0$")
            panel.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), aspect="equal")
            style.label(panel, name, "real part", "imaginary part")
        grid, density = run.density
        levels = _contour_levels(density)
        scatters[-1].contour(grid.real, grid.imag, density, levels=levels, colors="black", linewidths=0.8)
        style.legend(scatters[0], loc="lower left")
        degrees = ((torch.arange(BINS) + 0.5) * 360 / BINS - 180).numpy()
        scale = BINS / 360 * 100
        angular.bar(degrees, scale * run.angles.numpy(), width=360 / BINS, color=style.BLUE, alpha=0.6, label="samples")
        angular.step(degrees, scale * run.exact.numpy(), where="mid", color="black", lw=1, label="exact")
        angular.set_xlim(-180, 180)
        style.label(angular, run.title.split(":")[0], "angle (degrees)", "probability per degree (%)")
        style.legend(angular)
    style.save(figure, path, dpi=80)


def _contour_levels(density: torch.Tensor) -> list[float]:
    """Densities whose contours hold 95 and 50 % of the probability."""
    ordered = density.flatten().sort(descending=True).values
    mass = ordered.cumsum(0)
    return [float(ordered[int((mass < share).sum())]) for share in (0.95, 0.5)]


def text(data: Data) -> str:
    rows = [(run.title, f"{run.distance:.4f}", f"{run.expected:.4f}") for run in data.runs]
    return "\n\n".join(
        [
            "*See:* neither start lies on the ring. Noise of level sigma_ws hides that; the way down brings every "
            "chain to plausible points; annealed Langevin dynamics turns them into the posterior (contours hold 50 and "
            f"95 % of it). y = {DATA.real:g} + {DATA.imag:g}i with η = {ETA:g}; ring of radius 1 and width {WIDTH:g}, "
            f"smoothed by {SIGMA_MIN:g}; sigma_ws = {SIGMA_WS:g}; {data.n} chains.",
            style.table(
                ("run", f"total variation distance of the angles, {BINS} sectors", "exact draws would show"), rows
            ),
        ]
    )
