"""Are samplers calibrated with the *learned* prior, where no closed form tells?

    python -m benchmarks.learned_prior_calibration --replicates 200 --sampler annealed_langevin --sampler dps

Truths are drawn from the prior, measured, and reconstructed; then truth and samples must be exchangeable
(`mri_posterior.calibration`). No mismatch of data and prior can hide a sampler's error here.

What "drawn from the prior" means needs care. The target's prior is the law ``p_sigma_min`` whose score is
``(D(x, sigma_min) - x)/sigma_min^2``. The law of reverse diffusion is another one, for a network's scores at different
levels are not those of one distribution; and ``p_sigma_min`` alone cannot be sampled by a long chain, because at
``sigma_min`` the network does not know how bright an image should be: chains of `brain_t1_2mm` brighten without end,
their mean energy by two fifths in 20 steps and eightyfold in 320. So calibration is conditional (Säilynoja et al. 2025,
posterior SBC):

1. reverse diffusion draws an image, whose *central* k-space lines are measured: the pilot data;
2. truths are drawn from ``p_sigma_min(x | pilot)`` by a long Langevin chain of small steps, which is confined;
3. the other lines are measured from each truth; the sampler sees both, as in any scan with a sampled centre.

Given the pilot data, truth and measurement then have exactly the joint law that the target is the conditional of,
whatever the pilot data are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Complex, Float

from mri_posterior.calibration import (
    CoverageCurve,
    Estimate,
    IntervalCoverage,
    RankTest,
    averaging_gain,
    interval_coverage_from_ranks,
    rank_test,
    spread_skill,
    tarp,
)
from mri_posterior.exact import coil_maps, line_mask, white
from mri_posterior.noise import stable_seed
from mri_posterior.operator import SenseOperator, fft2c
from mri_posterior.posterior import Posterior
from mri_posterior.priors import Prior, load_prior
from mri_posterior.samplers import SAMPLERS, Sampler, sample
from mri_posterior.samplers.annealed_langevin import cg_sense

Images = Complex[torch.Tensor, "n H W"]

SIZE, COILS, EVERY, CENTRE, NOISE_STD = 32, 2, 4, 8, 0.03
TRUTHS_PER_PILOT = 10


@dataclass(frozen=True)
class Replicate:
    """A truth and the posterior of its measurement."""

    truth: Complex[torch.Tensor, "H W"]
    posterior: Posterior


@dataclass(frozen=True)
class Verdict:
    """All tests of one sampler."""

    names: tuple[str, ...]
    ranks: RankTest
    tarp: CoverageCurve
    coverage: IntervalCoverage
    spread_skill: Estimate
    averaging_gain: Estimate
    n_evaluations: int
    seconds: float

    @property
    def p_value(self) -> float:
        """Of ranks and TARP together (Bonferroni): a right sampler is below alpha at most in a share alpha of runs."""
        return min(1.0, 2 * min(self.ranks.p_value, self.tarp.p_value))


def replicates(prior: Prior, n: int, sigma_min: float, seed: int = 0) -> list[Replicate]:
    """Truths ``x ~ p_sigma_min(x | pilot)`` and their measurements; see the module's text."""
    shape = (SIZE, SIZE)
    maps = coil_maps(COILS, shape, torch.complex64)
    # Lines 0, every, 2 every, … and the centre; the pilot data are the centre alone.
    scan = SenseOperator(maps, line_mask(shape, EVERY, CENTRE))
    centre = torch.zeros(shape, dtype=torch.bool)
    centre[:, SIZE // 2 - CENTRE // 2 : SIZE // 2 + CENTRE - CENTRE // 2] = True
    pilot_scan = SenseOperator(maps, centre)
    # Steps of 0.3 because long ones are biased: at 1, images with little in them get up to 15 % too much energy in
    # unmeasured lines; at 0.2, 0.3 and 0.5 it agrees within its sampling error of 2 %. Over 200 of them the slowest of
    # the functionals below forgets all but a few hundredths of where it started.
    chain = SAMPLERS["annealed_langevin"](sigma_min=sigma_min, h=0.3, final_steps=200)
    result: list[Replicate] = []
    for pilot in range(-(-n // TRUTHS_PER_PILOT)):
        generator = torch.Generator().manual_seed(stable_seed(seed, "pilot", pilot))
        nothing = Posterior(prior, pilot_scan, torch.zeros(scan.data_shape, dtype=torch.complex64), NOISE_STD)
        diffusion = SAMPLERS["reverse_diffusion"](sigma_min=sigma_min)
        image = sample(diffusion, nothing, 1, seed, key=("pilot", pilot)).images[0]
        kspace = measure(pilot_scan, image, generator)
        conditional = Posterior(prior, pilot_scan, kspace, NOISE_STD)
        for truth in sample(chain, conditional, TRUTHS_PER_PILOT, seed, key=("truth", pilot)).images:
            both = torch.where(centre, kspace, measure(scan, truth, generator))
            result.append(Replicate(truth, Posterior(prior, scan, both, NOISE_STD)))
    return result[:n]


def measure(operator: SenseOperator, image: Complex[torch.Tensor, "H W"], generator: torch.Generator) -> torch.Tensor:
    noise = NOISE_STD * white(generator, *operator.data_shape, dtype=operator.dtype)
    return operator.forward(image) + operator.mask * noise


def functionals(posterior: Posterior, images: Images) -> dict[str, Float[torch.Tensor, n]]:
    """Scalars of each image: means of regions, energies of lines never measured, and what only the data define."""
    low, high = SIZE // 4, SIZE // 2
    centre, corner = images[:, low:high, low:high].mean((1, 2)), images[:, high : 3 * low, high:].mean((1, 2))
    energy = fft2c(images).abs().square().sum(1)
    unmeasured = (~posterior.operator.mask[0]).nonzero().flatten().tolist()
    thirds = [unmeasured[i * len(unmeasured) // 3] for i in range(3)]
    return {
        "region A, real": centre.real,
        "region A, imaginary": centre.imag,
        "region A, magnitude": images[:, low:high, low:high].abs().mean((1, 2)),
        "region B, real": corner.real,
        "region B, imaginary": corner.imag,
        "region B, magnitude": images[:, high : 3 * low, high:].abs().mean((1, 2)),
        **{f"energy of line {line}": energy[:, line] for line in thirds},
        "misfit": posterior.misfit(images),
        "distance from CG-SENSE": (images - cg_sense(posterior)).abs().square().sum((1, 2)),
    }


def judge(
    sampler: Sampler,
    problems: Sequence[Replicate],
    n_samples: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Verdict:
    """Sample the posterior of every replicate, and test ranks, joint coverage, spread and gain."""
    started, rows, references, images, n_evaluations = time.perf_counter(), [], [], [], 0
    for i, problem in enumerate(problems):
        result = sample(sampler, problem.posterior, n_samples, seed, key=("replicate", i))
        together = torch.cat([problem.truth[None], result.images])
        values = functionals(problem.posterior, together)
        rows.append(torch.stack([v.double() for v in values.values()], dim=1).numpy())
        at_cg = functionals(problem.posterior, cg_sense(problem.posterior))
        references.append([float(v) for v in at_cg.values()])
        images.append(together.numpy())
        n_evaluations = result.n_evaluations
        progress(i + 1)
    values, names = np.stack(rows), tuple(functionals(problems[0].posterior, problems[0].truth[None]))
    truth, samples = values[:, 0], values[:, 1:]
    rng = np.random.default_rng(seed)
    ranks = rank_test(truth, samples, rng)
    # TARP in the few dimensions of the regions' means: the curve says little in many. References scatter around
    # CG-SENSE, which the data define, by as much as the functionals do.
    regions = slice(0, 6)
    centres = np.array(references)[:, regions]
    scattered = centres + values[..., regions].std(axis=(0, 1)) * rng.standard_normal(centres.shape)
    curve = tarp(truth[:, regions], samples[..., regions], scattered, rng)
    stacked = np.stack(images)
    return Verdict(
        names,
        ranks,
        curve,
        interval_coverage_from_ranks(ranks.ranks, n_samples, (0.5, 0.9)),
        spread_skill(stacked[:, 0], stacked[:, 1:]),
        averaging_gain(stacked[:, 0], stacked[:, 1:]),
        n_evaluations,
        time.perf_counter() - started,
    )


def report(name: str, verdict: Verdict) -> str:
    """One sampler's table."""
    lines = [
        f"{name}: p = {verdict.p_value:.2g} ({'rejected' if verdict.p_value < 0.01 else 'not rejected'} at 0.01), "
        f"{verdict.n_evaluations} evaluations, {verdict.seconds:.0f} s",
        f"  ranks p = {verdict.ranks.p_value:.2g} (Holm), TARP p = {verdict.tarp.p_value:.2g}",
        f"  V/B {_plain(verdict.spread_skill)}   gain of averaging {_plain(verdict.averaging_gain)} dB",
        "  functional               p        mean rank   " + "   ".join(f"in {x:.0%}" for x in verdict.coverage.levels),
    ]
    n_samples = len(verdict.tarp.credibility) - 2
    for k, functional in enumerate(verdict.names):
        inside = "   ".join(f"{row[k]:5.1%}" for row in verdict.coverage.coverage)
        place = verdict.ranks.ranks[:, k].mean() / n_samples
        lines.append(f"  {functional:<24} {verdict.ranks.p_values[k]:<8.2g} {place:<11.3f} {inside}")
    return "\n".join(lines)


def _plain(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ± {estimate.standard_error:.3f} (expected {estimate.expected:.3f})"


def samplers(sigma_min: float) -> dict[str, Sampler]:
    """All that can be judged, by name, with one target: the package's, and Euler's scheme as a known wrong one."""
    euler = SAMPLERS["annealed_langevin"](sigma_min=sigma_min, kernel="ula", h=0.5, final_steps=30)
    return {name: cls(sigma_min=sigma_min) for name, cls in SAMPLERS.items()} | {"euler": euler}


def main(arguments: Sequence[str] | None = None) -> None:
    known = samplers(0.02)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--samples", type=int, default=31, help="per replicate: 15, 23, 31, …")
    parser.add_argument("--sampler", action="append", choices=sorted(known), help="may be repeated")
    parser.add_argument("--prior", default="brain_t1_2mm", help="a shipped prior or a prior's directory")
    parser.add_argument("--sigma-min", type=float, default=0.02, help="smoothing of the prior in the target")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    prior = load_prior(options.prior)
    problems = replicates(prior, options.replicates, options.sigma_min, options.seed)
    for name in options.sampler or ["annealed_langevin", "euler", "preconditioned_ula"]:
        verdict = judge(samplers(options.sigma_min)[name], problems, options.samples, options.seed)
        print(report(name, verdict), flush=True)


if __name__ == "__main__":
    main()
