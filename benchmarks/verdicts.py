"""How often does the verdict find a fault of a scan, and how often does it cry wolf?

    python -m benchmarks.verdicts --input ixi_brain_t1_2mm.h5 --write

Slices of the validation subjects, at random heights, are measured as in `benchmarks.retrospective` (equispaced 4x and
Poisson 8x, noise 0.02 and 0.01, in turn). Two scans in five are as the model says; the others have one of six faults:

- noise too low, noise too high: the level that the verdict is told is half, or twice, the true one;
- empty lines: a tenth of the columns of k-space outside of the calibration centre hold noise alone;
- positions: every sample outside of the centre holds what belongs one column further left;
- shift: the object lay 2 to 4 pixels further along one axis while a third of the columns were measured;
- rotation: it was turned by 4 degrees instead.

Of what was sampled outside of the centre, 15 % is withheld; 4 samples are drawn from the rest, 42 network evaluations
each.
The margins of `mri_posterior.verdict` were chosen on scans of the training subjects (``--split train``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch
from jaxtyping import Complex
from scipy import stats

from benchmarks.exactness import ROOT, put_between
from benchmarks.paper.style import table
from benchmarks.retrospective import SETTINGS, Setting
from mri_posterior.augmentation import percentile, scan
from mri_posterior.config import ReconstructionConfig, load_config
from mri_posterior.exact import coil_maps, white
from mri_posterior.masks import make_mask
from mri_posterior.noise import stable_seed
from mri_posterior.operator import SenseOperator
from mri_posterior.posterior import Posterior
from mri_posterior.priors import Prior, load_prior
from mri_posterior.progress import progress_view
from mri_posterior.samplers import Sampler, sample
from mri_posterior.scan_checks import calibration_centre
from mri_posterior.slices import MultiCoilSlice
from mri_posterior.verdict import Verdict, judge, withhold

CLEAN = "none"
CAUSES = {
    CLEAN: {"none"},
    "noise too low": {"noise too low"},
    "noise too high": {"noise too high"},
    "empty lines": {"empty lines"},
    "positions": {"positions", "lines"},
    "shift": {"lines"},
    "rotation": {"lines"},
}
"""What the verdict should name: a wrong place cannot always be told from motion, and the wording says so."""
COILS, SAMPLES, WITHHELD = 8, 4, 0.15
HEIGHTS = (0.25, 0.75)  # of the head


@dataclass(frozen=True)
class Outcome:
    fault: str
    setting: str
    verdict: Verdict

    @property
    def alarm(self) -> bool:
        return not self.verdict.consistent

    @property
    def named(self) -> bool:
        return self.verdict.cause in CAUSES[self.fault]


def slices(path: Path, split: str, n: int) -> Complex[torch.Tensor, "n H W"]:
    """Slices of the subjects of `split` in turn, scaled to a 99th percentile of 1, with smooth phase."""
    rng = np.random.default_rng(stable_seed("verdicts", split))
    with h5py.File(path) as file:
        subject, splits = np.asarray(file["subject_index"]), np.asarray(file["split"]).astype(str)
        chosen = []
        for i in range(n):
            subjects = np.flatnonzero(splits == split)
            of_subject = np.flatnonzero(subject == subjects[i % len(subjects)])
            chosen.append(int(of_subject[round(rng.uniform(*HEIGHTS) * (len(of_subject) - 1))]))
        images = torch.from_numpy(np.stack([file["images"][index] for index in chosen])).float()
    generator = torch.Generator().manual_seed(stable_seed("verdicts phase", split))
    return scan(images / percentile(images), generator, jitter=False)


def measure(image: Complex[torch.Tensor, "H W"], setting: Setting, fault: str, key: tuple) -> MultiCoilSlice:
    """A scan of `image` with a fault, as the faults are described above."""
    generator = torch.Generator().manual_seed(stable_seed("verdicts", *key))
    shape, eta = (image.shape[0], image.shape[1]), setting.noise_std
    maps = coil_maps(COILS, shape, torch.complex64)
    mask = torch.from_numpy(make_mask(setting.mask, shape, "verdicts"))
    everything = SenseOperator(maps, torch.ones_like(mask))
    kspace = everything.forward(image)
    outside = mask & ~calibration_centre(mask)
    if fault == "positions":
        kspace = torch.where(outside, kspace.roll(1, -1), kspace)
    elif fault == "empty lines":
        kspace = torch.where(some_columns(outside, 0.1, generator), 0, kspace)
    elif fault in ("shift", "rotation"):
        moved = everything.forward(shifted(image, generator) if fault == "shift" else rotated(image, 4.0))
        kspace = torch.where(some_columns(outside, 1 / 3, generator), moved, kspace)
    kspace = mask * (kspace + eta * white(generator, *kspace.shape, dtype=torch.complex64))
    claimed = eta * {"noise too low": 1 / 2, "noise too high": 2.0}.get(fault, 1.0)
    return MultiCoilSlice(kspace, mask, maps, claimed, 1.0, torch.ones(shape, dtype=torch.complex64))


def some_columns(outside: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    columns = outside.any(0).nonzero()[:, 0]
    order = torch.randperm(len(columns), generator=generator)
    chosen = torch.zeros_like(outside)
    chosen[:, columns[order[: max(1, round(share * len(columns)))]]] = True
    return chosen & outside


def shifted(image: Complex[torch.Tensor, "H W"], generator: torch.Generator) -> Complex[torch.Tensor, "H W"]:
    distance, axis, sign = (int(torch.randint(n, (), generator=generator)) for n in (3, 2, 2))
    return image.roll((2 + distance) * (2 * sign - 1), axis)


def rotated(image: Complex[torch.Tensor, "H W"], degrees: float) -> Complex[torch.Tensor, "H W"]:
    height, width = image.shape
    angle = np.deg2rad(degrees)
    theta = [[np.cos(angle), -np.sin(angle) * height / width, 0], [np.sin(angle) * width / height, np.cos(angle), 0]]
    channels = torch.view_as_real(image).permute(2, 0, 1)[None]
    grid = torch.nn.functional.affine_grid(torch.tensor(theta).float()[None], channels.shape, align_corners=False)
    turned = torch.nn.functional.grid_sample(channels, grid, mode="bicubic", align_corners=False)[0]
    return torch.view_as_complex(turned.permute(1, 2, 0).contiguous())


def schedule(n: int) -> list[tuple[str, Setting]]:
    """Fault and setting of each scan: 40 % clean, the rest shared out evenly; settings in turn within each."""
    faults = [fault for fault in CAUSES if fault != CLEAN]
    clean = round(0.4 * n)
    counts = {CLEAN: clean} | {f: len(range(i, n - clean, len(faults))) for i, f in enumerate(faults)}
    # Faults start at different settings, so that few scans still meet all of them.
    return [
        (fault, SETTINGS[(turn + number) % len(SETTINGS)])
        for number, (fault, count) in enumerate(counts.items())
        for turn in range(count)
    ]


def run(
    image: Complex[torch.Tensor, "H W"], setting: Setting, fault: str, prior: Prior, sampler: Sampler, key: tuple
) -> Outcome:
    whole = measure(image, setting, fault, key)
    given, withheld = withhold(whole, WITHHELD, stable_seed("verdicts", *key))
    posterior = Posterior(prior, SenseOperator(given.maps, given.mask), given.kspace, given.noise_std)
    drawn = sample(sampler, posterior, SAMPLES, key=("verdicts", *key))
    return Outcome(fault, setting.name, judge(whole, withheld, drawn.images))


def tables(outcomes: Sequence[Outcome]) -> str:
    """Alarms and causes fault by fault, and clean scans setting by setting with the largest effects seen there."""
    rows = []
    for fault in CAUSES:
        of_fault = [outcome for outcome in outcomes if outcome.fault == fault]
        if of_fault:
            alarms, named = sum(o.alarm for o in of_fault), sum(o.named for o in of_fault)
            rows.append([fault, len(of_fault), f"{alarms} ({interval(alarms, len(of_fault))})", named])
    effects = []
    for setting in SETTINGS:
        clean = [o for o in outcomes if o.fault == CLEAN and o.setting == setting.name]
        if clean:
            largest = [f"{max(effect(o.verdict, what) for o in clean):.2f}" for what in EFFECTS]
            mean = np.mean([o.verdict.coverage for o in clean])
            effects.append([setting.name, len(clean), sum(o.alarm for o in clean), *largest, f"{mean:.0%}"])
    headings = ("clean scans", "scans", "alarms", *EFFECTS, "coverage of 90 % intervals")
    parts = [table(("fault", "scans", "alarms (95 % interval)", "cause named rightly"), rows)]
    return "\n\n".join(parts + [table(headings, effects)] * bool(effects))


EFFECTS = ("worst line", "worst band", "least gain", "position", "prediction")


def effect(verdict: Verdict, what: str) -> float:
    """The largest significant effect, or what a right model has where none is significant."""
    kinds = {"least gain": "gain", "position": "position", "prediction": "prediction"}
    of_kind = [
        check.value
        for check in verdict.checks
        if check.kind == kinds.get(what, "residual")
        and check.adjusted < 0.05
        and (what != "worst line" or check.where.startswith(("column", "row")))
        and (what != "worst band" or check.where.startswith("band"))
    ]
    if what == "least gain":
        return -min(of_kind, default=0.0)
    if what == "position":
        return max(map(abs, of_kind), default=0.0)
    return max(of_kind, default=1.0)


def interval(count: int, n: int) -> str:
    """Clopper and Pearson's exact 95 % interval."""
    bounds = stats.binomtest(count, n).proportion_ci(0.95)
    return f"{bounds.low:.0%} to {bounds.high:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="magnitude slices with a split by subject")
    parser.add_argument("--prior", help="instead of the configuration's")
    parser.add_argument("--scans", type=int, default=250, help="two in five are clean")
    parser.add_argument("--split", default="val", choices=("val", "train"), help="train: to choose margins")
    parser.add_argument("--only", nargs="+", choices=list(CAUSES), help="these faults")
    parser.add_argument("--json", type=Path, help="write every verdict there, one a line")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/verdict.md")
    options = parser.parse_args()
    config = load_config(ReconstructionConfig, "brain4x.yaml")
    prior = load_prior(options.prior or config.prior.name)
    sampler = replace(config.sampler, diffusion_steps=8, final_steps=16)
    plan = list(enumerate(schedule(options.scans)))
    images = slices(options.input, options.split, len(plan))
    plan = [entry for entry in plan if not options.only or entry[1][0] in options.only]
    outcomes = []
    with progress_view("verdicts", len(plan)) as progress:
        for done, (index, (fault, setting)) in enumerate(plan, 1):
            outcomes.append(run(images[index], setting, fault, prior, sampler, (options.split, index)))
            progress(done)
    if options.json:
        lines = [json.dumps({"fault": o.fault, "setting": o.setting} | asdict(o.verdict)) for o in outcomes]
        options.json.write_text("\n".join(lines) + "\n")
    print(tables(outcomes))
    if options.write:
        put_between(ROOT / "docs" / "verdict.md", "verdicts", tables(outcomes))


if __name__ == "__main__":
    main()
