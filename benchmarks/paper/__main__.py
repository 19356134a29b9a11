"""Recompute the paper's figures: ``python -m benchmarks.paper [--only NAME] [--quick] [--output DIR]``."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.paper import ablations, ring, robustness, schedule, tasks, theorem, variance_dip

MODULES = {m.NAME: m for m in (schedule, ring, variance_dip, robustness, theorem, tasks, ablations)}
ROOT = Path(__file__).parents[2]

INTRODUCTION = """\
# The paper, figure by figure

Xun, Gupta and Price, *Posterior Sampling by Combining Diffusion Models with Annealed Langevin Dynamics* (NeurIPS 2025,
arXiv 2510.26324), recomputed with this package: every number and picture below was written by `make figures`
(`python -m benchmarks.paper`; `--only NAME` for one, in brackets). Noise levels are per real channel.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--only", choices=MODULES, action="append", help="this figure alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny versions, to see that everything runs")
    parser.add_argument("--output", type=Path, help="folder of paper.md and figures/: docs, or outputs/paper")
    options = parser.parse_args(arguments)
    output = options.output or (ROOT / "outputs" / "paper" if options.quick else ROOT / "docs")
    # Images of this size do not gain from threads, and a fixed number keeps sums in one order.
    torch.set_num_threads(1)
    page = output / "paper.md"
    sections = read_sections(page)
    for name in options.only or MODULES:
        started = time.monotonic()
        module = MODULES[name]
        data = module.compute(options.quick)
        module.draw(data, output / "figures" / f"{name}.png")
        sections[name] = f"![{module.TITLE}](figures/{name}.png)\n\n{module.text(data)}"
        page.write_text(render(sections), encoding="utf-8")
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"written: {page}")


def render(sections: dict[str, str]) -> str:
    """The page, sections in the order of `MODULES`."""
    parts = [INTRODUCTION]
    parts += [f"## {MODULES[name].TITLE} [{name}]\n\n{sections[name]}\n" for name in MODULES if name in sections]
    return "\n".join(parts)


def read_sections(page: Path) -> dict[str, str]:
    """What an earlier run wrote, so that ``--only`` leaves the other figures in their places."""
    if not page.is_file():
        return {}
    found = re.split(r"^## .* \[(\w+)\]\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {name: body.strip() for name, body in zip(found[::2], found[1::2], strict=True) if name in MODULES}


if __name__ == "__main__":
    main()
