"""Figures 4 to 6: inpainting, super-resolution and deblurring with a learned prior, against Langevin time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Complex

from benchmarks.paper import style
from mri_posterior.distances import frechet_distance, gabor_features
from mri_posterior.exact import white
from mri_posterior.image_operators import Blur, Downsample, PixelMask
from mri_posterior.operator import LinearOperator
from mri_posterior.phantoms import brain_slices, smooth_phase
from mri_posterior.posterior import Posterior
from mri_posterior.priors import load_prior
from mri_posterior.samplers import SAMPLERS, AnnealedLangevin, sample
from mri_posterior.samplers.step import Sampler
from mri_posterior.training_data import MagnitudeSlices

NAME = "tasks"
TITLE = "Figures 4 to 6: three tasks with a learned prior"
SHAPE = (120, 96)  # whole heads: crops that cut through one are not what the prior has seen
NOISE = 0.05  # per real channel, of a pixel
HELD_OUT = Path(__file__).parents[2].parent / "shared" / "data" / "ixi_brain_t1_2mm.h5"
CHAINS, SHEET = 2, 6  # samples per image, and of the first one
PUBLISHED, OURS = "Algorithm 3 as published", "guided (ours)"


@dataclass
class Traced:
    """A sampler that notes the chains after every Langevin step; `sample` asks no more of a sampler than this."""

    inner: Sampler
    states: list[torch.Tensor] = field(default_factory=list)

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def step(self, streams, state, step):
        if step.phase == "langevin" and not self.states:
            self.states.append(state.x)
        state = self.inner.step(streams, state, step)
        if step.phase == "langevin":
            self.states.append(state.x)
        return state


@dataclass
class Curve:
    """After each Langevin step, over all images: `l2`, root mean square error per pixel of one sample, and `mean_l2` of
    the mean of `CHAINS`; `frechet`: distance of single samples from other images, after the steps `at`;
    `spread_to_skill`: of the result, the samples' variance over the squared error of their mean, 1 if exact.
    """

    l2: np.ndarray
    mean_l2: np.ndarray
    at: list[int]
    frechet: list[float]
    spread_to_skill: float
    evaluations: int


@dataclass
class Task:
    """`curves` by sampler; `dps_*`: of single results; `sheet`: images to look at, of the guided sampler."""

    title: str
    curves: dict[str, Curve]
    dps_l2: float
    dps_frechet: float
    sheet: dict[str, np.ndarray]


@dataclass
class Data:
    """`floor`: Fréchet distance of the true images from `reference` other ones."""

    tasks: list[Task]
    source: str
    n: int
    reference: int
    floor: float
    dps_steps: int


def images(n: int) -> tuple[Complex[torch.Tensor, "n H W"], str]:
    """Images that the prior was not trained on, from its own data set where that is at hand."""
    if HELD_OUT.is_file():
        return MagnitudeSlices(HELD_OUT).batch(("paper",), n, SHAPE, held_out=True), "held-out IXI subjects"
    magnitude = brain_slices(SHAPE, tuple(np.linspace(-25, 60, n)))
    phase = [smooth_phase(SHAPE, np.random.default_rng(i), 0.3) for i in range(n)]
    scaled = magnitude / np.percentile(magnitude, 99, axis=(1, 2), keepdims=True)
    return torch.from_numpy((scaled * np.stack(phase)).astype(np.complex64)), "slices of the MNI152 average brain"


def operators(generator: torch.Generator) -> dict[str, tuple[LinearOperator, float]]:
    """Each with the noise level in its own units."""
    dropped = 0.3 + 0.4 * torch.rand((), generator=generator)
    mask = torch.rand(*SHAPE, generator=generator) >= dropped
    return {
        "inpainting, 30 to 70 % dropped": (PixelMask(mask), NOISE),
        "super-resolution 4x": (Downsample(SHAPE, 4), 4 * NOISE),  # its data are four times the block means
        "deblurring, 25 x 25, s.d. 1.2": (Blur(SHAPE, std=1.2, size=25), NOISE),
    }


def compute(quick: bool = False) -> Data:
    n, reference = (2, 6) if quick else (24, 200)
    everything, source = images(n + reference)
    truths, others = everything[:n], _features(everything[n:])
    settings = {"levels": 10, "steps_per_level": 2, "final_steps": 10}
    if quick:
        settings = {"levels": 2, "final_steps": 0, "diffusion_steps": 2, "precondition": "scalar"}
    samplers = {
        PUBLISHED: AnnealedLangevin(algorithm=3, guided=False, sigma_ws=0.3, **settings),
        OURS: AnnealedLangevin(algorithm=3, **settings),
    }
    dps = SAMPLERS["dps"](steps=4 if quick else 100)
    prior = load_prior("brain_t1_2mm")
    tasks = [
        _task(name, truths, others, prior, dps, samplers, CHAINS if quick else SHEET)
        for name in operators(torch.Generator())
    ]
    return Data(tasks, source, n, reference, _frechet(truths, others), dps.steps)


def _task(name: str, truths, others, prior, dps, samplers: dict[str, Sampler], n_sheet: int) -> Task:
    traces: dict[str, list] = {sampler: [] for sampler in samplers}
    evaluations, baselines = {}, []
    for index, truth in enumerate(truths):
        generator = torch.Generator().manual_seed(index)
        operator, eta = operators(generator)[name]
        data = operator.forward(truth)
        noisy = data + eta * white(generator, *data.shape, dtype=torch.complex64)
        posterior = Posterior(prior, operator, noisy, eta)
        baseline = sample(dps, posterior, 1, seed=index, key=("dps",)).images
        baselines.append(baseline[0])
        for sampler, settings in samplers.items():
            traced = Traced(settings)
            chains = n_sheet if index == 0 and sampler == OURS else CHAINS
            result = sample(traced, posterior, chains, seed=index, warm_start=baseline)
            traces[sampler].append(torch.stack([x[:CHAINS] for x in traced.states]))
            evaluations[sampler] = result.n_evaluations
            if index == 0 and sampler == OURS:
                sheet = _sheet(truth, _shown(operator, noisy), baseline[0], result.images)
    curves = {
        sampler: _curve(torch.stack(trace, 1), truths, others, evaluations[sampler])
        for sampler, trace in traces.items()
    }
    single = torch.stack(baselines)
    return Task(name, curves, float(_rms(single - truths)), _frechet(single, others), sheet)


def _curve(
    chains: Complex[torch.Tensor, "steps n chains H W"], truths: torch.Tensor, others: torch.Tensor, evaluations: int
) -> Curve:
    at = sorted({round(i) for i in np.linspace(0, len(chains) - 1, 8)})
    single = torch.stack([_rms(x - truths[:, None]) for x in chains])
    mean = torch.stack([_rms(x.mean(1) - truths) for x in chains])
    last = chains[-1]
    variance = float((last - last.mean(1, keepdim=True)).abs().square().mean()) * CHAINS / (CHAINS - 1)
    skill = float(mean[-1]) ** 2 - variance / CHAINS
    return Curve(
        single.numpy(),
        mean.numpy(),
        at,
        [_frechet(chains[i, :, 0], others) for i in at],
        variance / skill,
        evaluations,
    )


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.abs().square().mean().sqrt()


def _features(x: torch.Tensor) -> torch.Tensor:
    # 9 features: fewer than there are images.
    return gabor_features(x, orientations=3, cells=1)


def _frechet(x: torch.Tensor, others: torch.Tensor) -> float:
    return frechet_distance(_features(x), others)


def _shown(operator: LinearOperator, data: torch.Tensor) -> torch.Tensor:
    return operator.adjoint(data) if isinstance(operator, Downsample | PixelMask) else data


def _sheet(truth, measurement, baseline, samples) -> dict[str, np.ndarray]:
    magnitudes = samples.abs().numpy()
    return {
        "truth": truth.abs().numpy(),
        "measured": measurement.abs().numpy(),
        "DPS": baseline.abs().numpy(),
        **{f"sample {i + 1}": image for i, image in enumerate(magnitudes[:4])},
        "mean": samples.mean(0).abs().numpy(),
        "std": magnitudes.std(0, ddof=1),
    }


def draw(data: Data, path: Path) -> None:
    figure, axes = style.panels(3, 2)
    for task, top, bottom in zip(data.tasks, axes[:3], axes[3:], strict=True):
        for (name, curve), colour in zip(task.curves.items(), (style.ORANGE, style.BLUE), strict=True):
            top.plot(curve.l2, color=colour, lw=1.2, label=f"{name}: one sample")
            top.plot(curve.mean_l2, color=colour, lw=1.2, ls="-.", label=f"mean of {CHAINS}")
            bottom.plot(curve.at, [1e3 * f for f in curve.frechet], "o-", color=colour, ms=4, lw=1.2, label=name)
        top.axhline(task.dps_l2, color=style.RED, ls="--", lw=1.2, label="DPS")
        bottom.axhline(1e3 * task.dps_frechet, color=style.RED, ls="--", lw=1.2, label="DPS")
        bottom.axhline(1e3 * data.floor, color="black", ls=":", lw=1, label="true images")
        top.set_ylim(bottom=0)
        bottom.set_ylim(0, 1.4 * bottom.get_ylim()[1])
        style.label(top, task.title, "Langevin steps", "rms error per pixel (of brightness)")
        style.label(bottom, "", "Langevin steps", "Fréchet distance of features x 1000")
    style.legend(axes[0], loc="lower left")
    style.legend(axes[3])
    style.save(figure, path)
    for task in data.tasks:
        _draw_sheet(task, path.with_name(sheet_name(task)))


def sheet_name(task: Task) -> str:
    return f"{NAME}_{task.title.split()[0].strip(',')}.png"


def _draw_sheet(task: Task, path: Path) -> None:
    figure, axes = style.panels(len(task.sheet), width=1.1, height=1.6)
    for panel, (name, image) in zip(axes, task.sheet.items(), strict=True):
        spread = name == "std"
        panel.imshow(image, cmap="magma" if spread else "gray", vmin=0, vmax=0.3 if spread else 1.1)
        panel.set_axis_off()
        panel.set_title(name, fontsize=7)
    style.save(figure, path, dpi=100)


def text(data: Data) -> str:
    rows = []
    for task in data.tasks:
        for name, c in task.curves.items():
            for label, step in (("before", 0), (f"after {len(c.l2) - 1} steps", -1)):
                ratio = f"{c.spread_to_skill:.2f}" if step else ""
                errors = f"{c.l2[step]:.3f}", f"{c.mean_l2[step]:.3f}"
                rows.append((task.title, f"{name}, {label}", *errors, ratio, f"{1e3 * c.frechet[step]:.2f}"))
        rows.append((task.title, "DPS", f"{task.dps_l2:.3f}", "", "", f"{1e3 * task.dps_frechet:.2f}"))
    ratios = [curve.spread_to_skill for task in data.tasks for curve in task.curves.values()]
    counts = ", ".join(f"{name} {curve.evaluations}" for name, curve in data.tasks[0].curves.items())
    return "\n\n".join(
        [
            f"*See:* {data.n} images of {SHAPE[0]} x {SHAPE[1]} pixels of 2 mm ({data.source}), prior `brain_t1_2mm`, "
            f"noise {NOISE:g} of the brightness per real channel and pixel. All chains start from DPS's result. One "
            "sample is not meant to be nearest to the truth: an exact one misses it by √2 times what the posterior "
            f"mean does, so compare DPS, whose spread is no posterior's, with the mean of {CHAINS} samples as well. "
            "Spread to skill is the samples' variance over the squared error of their mean; below 1 the samples are "
            f"too much alike (here {min(ratios):.2f} to {max(ratios):.2f}).",
            style.table(
                ("task", "sampler", "rms error", f"of the mean of {CHAINS}", "spread to skill", "Fréchet x 1000"), rows
            ),
            f"Fréchet distance: of means and covariances of 9 log-Gabor magnitudes, from {data.reference} other "
            f"images; the {data.n} true images are at {1e3 * data.floor:.2f}, so differences below that are "
            f"chance. It is no FID and cannot be set beside one. Evaluations per sample: DPS {data.dps_steps}, each "
            f"with a gradient; {counts}. The blur is 61 x 61 with standard deviation 3 at 256 pixels, scaled to this "
            "size.",
            "One image, samples of the guided sampler:",
            *(f"![{task.title}](figures/{sheet_name(task)})" for task in data.tasks),
            "*See:* where samples differ, the standard deviation is bright (window 0 to 0.3; images 0 to 1.1).",
        ]
    )
