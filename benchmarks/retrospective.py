"""Does the shipped brain prior reconstruct held-out subjects better than classical methods, and with honest spread?

    python -m benchmarks.retrospective --input ixi_brain_t1_2mm.h5 --write

The middle slices of the data set's validation subjects, with simulated smooth phase, are measured by eight simulated
coils: equispaced 4x with 8 centre lines, Poisson 8x with a 24x24 centre, complex noise of 0.02 and 0.01 of the image's
99th percentile per real channel. Every method is given the same k-space, coil maps and noise level.

The strength of each classical method is the best of a grid *on these very slices*, setting by setting: no user could do
as well. Sampler and prior are those of ``brain4x.yaml``. Scores are fastMRI's PSNR and SSIM of the magnitude, slice by
slice.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from jaxtyping import Complex

from benchmarks.exactness import ROOT, put_between
from benchmarks.paper.style import table
from mri_posterior.augmentation import percentile, scan
from mri_posterior.baselines import BASELINES
from mri_posterior.calibration import Estimate, spread_skill
from mri_posterior.calibration_data import simulated_slice
from mri_posterior.config import ReconstructionConfig, load_config
from mri_posterior.masks import MaskConfig, make_mask
from mri_posterior.metrics import psnr, ssim
from mri_posterior.noise import stable_seed
from mri_posterior.operator import SenseOperator
from mri_posterior.posterior import Posterior
from mri_posterior.priors import Prior, load_prior
from mri_posterior.samplers import Sampler, sample
from mri_posterior.slices import MultiCoilSlice

POSTERIOR_MEAN, CHAIN_MEAN, ONE_SAMPLE = "posterior mean", "mean of the chains", "one sample"
HEIGHTS = (0.5,)  # of the head, from its lowest slice to its highest
# Multiples of the noise level (CG-SENSE) or of its square (sparse methods); each setting's best lies inside.
GRIDS = {
    "cg_sense": (0.5, 0.7, 1.0, 1.4, 2.0, 2.8),
    "l1_wavelet": (4.0, 6.0, 9.0, 13.0, 19.0, 27.0),
    "tv": (3.6, 5.0, 7.0, 10.0, 14.0),
}


@dataclass(frozen=True)
class Setting:
    """One way to measure: a row of the table."""

    name: str
    mask: MaskConfig
    noise_std: float


SETTINGS = tuple(
    Setting(f"{name}, noise {noise:g}", mask, noise)
    for name, mask in (
        ("equispaced 4x", MaskConfig("equispaced", 4, center_fraction=8 / 90)),
        ("Poisson 8x", MaskConfig("poisson", 8, calib=(24, 24), seed=0)),
    )
    for noise in (0.02, 0.01)
)


@dataclass(frozen=True)
class Score:
    psnr: float
    ssim: float


def measure(image: Complex[torch.Tensor, "H W"], setting: Setting, index: int) -> MultiCoilSlice:
    """Slice number `index` as `setting` measures it: undersampled multi-coil k-space with noise."""
    mask = torch.from_numpy(make_mask(setting.mask, (image.shape[0], image.shape[1]), "retrospective"))
    generator = torch.Generator().manual_seed(stable_seed("retrospective", setting.name, index))
    return simulated_slice(image, mask, setting.noise_std, generator)


def score(truth: Complex[torch.Tensor, "H W"], image: Complex[torch.Tensor, "H W"]) -> Score:
    target, other = (np.abs(np.asarray(x))[None].astype(np.float32) for x in (truth, image))
    return Score(psnr(target, other), ssim(target, other))


def reference(path: Path) -> Complex[torch.Tensor, "n H W"]:
    """Slices at `HEIGHTS` of every validation subject, scaled to a 99th percentile of 1, with smooth phase."""
    with h5py.File(path) as file:
        subject, split = np.asarray(file["subject_index"]), np.asarray(file["split"]).astype(str)
        chosen = []
        for number in np.flatnonzero(split == "val"):
            of_subject = np.flatnonzero(subject == number)
            chosen += [int(of_subject[round(height * (len(of_subject) - 1))]) for height in HEIGHTS]
        images = torch.from_numpy(file["images"][sorted(chosen)]).float()
    generator = torch.Generator().manual_seed(stable_seed("retrospective phase"))
    return scan(images / percentile(images), generator, jitter=False)


def tuned_baseline(name: str, slices: list[MultiCoilSlice], truths: Complex[torch.Tensor, "n H W"]) -> list[Score]:
    """Scores at the strength with the best mean PSNR, a multiple of the noise level or of its square."""
    power = 1 if name == "cg_sense" else 2
    runs = {
        strength: [
            score(truth, torch.from_numpy(BASELINES[name](given, strength * given.noise_std**power)))
            for given, truth in zip(slices, truths, strict=True)
        ]
        for strength in GRIDS[name]
    }
    best = max(runs, key=lambda strength: np.mean([s.psnr for s in runs[strength]]))
    if best in (min(runs), max(runs)):
        print(f"{name}: the best strength lies at the end of its grid ({best})")
    return runs[best]


@dataclass(frozen=True)
class Result:
    """One setting: every method's scores, slice by slice, and whether the samples' spread is their error."""

    setting: str
    scores: dict[str, list[Score]]
    spread_skill: Estimate
    seconds: float

    def mean(self, method: str, figure: str) -> float:
        return float(np.mean([getattr(s, figure) for s in self.scores[method]]))

    @property
    def best_baseline(self) -> str:
        return max((name for name in GRIDS), key=lambda name: self.mean(name, "psnr"))

    @property
    def gain(self) -> tuple[float, float]:
        """dB of the posterior mean over the best classical method, and the standard error over slices."""
        pairs = zip(self.scores[POSTERIOR_MEAN], self.scores[self.best_baseline], strict=True)
        gains = [ours.psnr - theirs.psnr for ours, theirs in pairs]
        return float(np.mean(gains)), float(np.std(gains, ddof=1) / len(gains) ** 0.5)

    @property
    def higher_ssim(self) -> float:
        """Share of slices on which the posterior mean has a higher SSIM than every classical method."""
        best = [max(scores, key=lambda s: s.ssim).ssim for scores in zip(*map(self.scores.get, GRIDS), strict=True)]
        return float(np.mean([s.ssim > b for s, b in zip(self.scores[POSTERIOR_MEAN], best, strict=True)]))


def run(
    setting: Setting, truths: Complex[torch.Tensor, "n H W"], prior: Prior, sampler: Sampler, n_samples: int
) -> Result:
    slices = [measure(image, setting, index) for index, image in enumerate(truths)]
    scores = {name: tuned_baseline(name, slices, truths) for name in GRIDS}
    scores |= {POSTERIOR_MEAN: [], CHAIN_MEAN: [], ONE_SAMPLE: []}
    images, started = [], time.monotonic()
    for index, (given, truth) in enumerate(zip(slices, truths, strict=True)):
        posterior = Posterior(prior, SenseOperator(given.maps, given.mask), given.kspace, given.noise_std)
        drawn = sample(sampler, posterior, n_samples, key=("retrospective", index))
        scores[POSTERIOR_MEAN].append(score(truth, drawn.images.mean(0)))
        scores[CHAIN_MEAN].append(score(truth, drawn.chains.mean.mean(0)))
        scores[ONE_SAMPLE].append(score(truth, drawn.images[0]))
        images.append(drawn.images.numpy())
    seconds = (time.monotonic() - started) / len(truths)
    return Result(setting.name, scores, spread_skill(truths.numpy(), np.stack(images)), seconds)


def tables(results: Sequence[Result]) -> str:
    """A table of every method's PSNR and SSIM, and one of what the posterior mean gains and its spread is worth."""
    methods = (*GRIDS, ONE_SAMPLE, POSTERIOR_MEAN, CHAIN_MEAN)
    cells = [[r.setting, *(f"{r.mean(m, 'psnr'):.2f} / {r.mean(m, 'ssim'):.3f}" for m in methods)] for r in results]
    summary = [
        [
            r.setting,
            r.best_baseline,
            f"{r.gain[0]:+.2f} ± {r.gain[1]:.2f}",
            f"{r.higher_ssim:.0%}",
            f"{r.spread_skill.value:.2f} ± {r.spread_skill.standard_error:.2f}",
        ]
        for r in results
    ]
    headings = ("setting", "best classical", "gain in PSNR, dB", "slices with higher SSIM", "spread/skill V/B")
    return f"{table(('PSNR, dB / SSIM', *methods), cells)}\n\n{table(headings, summary)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="magnitude slices with a split by subject")
    parser.add_argument("--prior", help="instead of the configuration's")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--every", type=int, default=1, help="take every so-manieth slice only: to see that it runs")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/prior.md")
    options = parser.parse_args()
    config = load_config(ReconstructionConfig, "brain4x.yaml")
    truths, prior = reference(options.input)[:: options.every], load_prior(options.prior or config.prior.name)
    results = []
    for setting in SETTINGS:
        results.append(run(setting, truths, prior, config.sampler, options.samples))
        print(f"{setting.name}: {results[-1].seconds:.1f} s per slice\n{tables(results[-1:])}\n", flush=True)
    if options.write:
        put_between(ROOT / "docs" / "prior.md", "retrospective", tables(results))


if __name__ == "__main__":
    main()
