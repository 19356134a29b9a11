"""How figures look and tables print: the same in every module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, distinct to colour-blind readers; markers and line styles differ too.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
CYCLE = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9")
MARKERS = "osD^vP"


def panels(columns: int, rows: int = 1, width: float = 3.5, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` panels, row by row, each of this size in inches."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)


def legend(axes: Axes, **options) -> None:
    axes.legend(fontsize=7, frameon=False, **options)


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No version of matplotlib in the file, so that equal figures are equal files.
    figure.savefig(path, dpi=dpi, metadata={"Software": None})


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
