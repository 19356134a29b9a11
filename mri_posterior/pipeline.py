"""The main job: a prepared volume in; posterior samples, their summary, metrics and pictures out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Complex, Complex64, Float32

from mri_posterior import __version__
from mri_posterior.baselines import BASELINES
from mri_posterior.config import ReconstructionConfig, dump_config
from mri_posterior.device import pick_device
from mri_posterior.diagnostics import chain_faults, slice_diagnostics
from mri_posterior.errors import UserError
from mri_posterior.files import atomic_path, require_free_space, require_writable
from mri_posterior.metrics import credible_interval, foreground_mask, image_metrics
from mri_posterior.operator import SenseOperator
from mri_posterior.panels import PanelImages, panel_title, write_panel
from mri_posterior.posterior import Posterior, PosteriorSamples, join_batches
from mri_posterior.preparation import Plan, PreparedSlice, prepare, stack_references
from mri_posterior.priors import prior_digest
from mri_posterior.progress import progress_view
from mri_posterior.samplers import sample
from mri_posterior.slices import MultiCoilSlice
from mri_posterior.volumes import VolumeReconstruction, write_reconstruction

log = logging.getLogger("mri_posterior")


@dataclass(frozen=True)
class SliceSummary:
    """What a result file holds of one slice, in the file's units and on its grid.

    Attributes
    ----------
    images: ``mean`` (complex), ``std``, ``lower``, ``upper`` of the magnitude, and the ``samples`` where they are kept.
    diagnostics: maps of `SliceDiagnostics`.
    numbers: one attribute of the file each, a value per slice.
    """

    images: dict[str, np.ndarray]
    diagnostics: dict[str, Float32[np.ndarray, "H W"]]
    numbers: dict[str, float]


def reconstruct_slice(
    config: ReconstructionConfig, slice_: MultiCoilSlice, prior, key: tuple, report=lambda done, total: None
) -> PosteriorSamples:
    """Posterior samples of one slice, in its normalised units.

    Where `config` has a ``std_tolerance``, further ones are drawn, ``samples`` at a time, until it is met: their number
    depends on the samples alone, not on the batch.
    """
    device = pick_device(config.device)
    operator = SenseOperator(slice_.maps.to(device), slice_.mask.to(device))
    posterior = Posterior(prior, operator, slice_.kspace.to(device), slice_.noise_std)
    start = torch.from_numpy(np.asarray(BASELINES[config.warm_start](slice_))).to(device, torch.complex64)
    most = config.samples if config.std_tolerance is None else config.most_samples
    batches = []
    for first, n in _batches(config.samples, most, config.batch):
        if first and first % config.samples == 0 and _known_well_enough(config, join_batches(batches)):
            break

        def progress(done: int, total: int, first: int = first, n: int = n) -> None:
            report(first * total + n * done, most * total)

        result = sample(
            config.sampler, posterior, n, config.seed, key=key, first=first, warm_start=start, progress=progress
        )
        batches.append(result)
    return join_batches(batches)


def _batches(samples: int, most: int, batch: int) -> Iterator[tuple[int, int]]:
    """First sample and size of every batch; none reaches beyond a multiple of `samples`, where sampling may stop."""
    first = 0
    while first < most:
        n = min(batch, samples - first % samples, most - first)
        yield first, n
        first += n


def _known_well_enough(config: ReconstructionConfig, result: PosteriorSamples) -> bool:
    return slice_diagnostics(result, tissue(result)).numbers["mcse_std_relative"] < config.std_tolerance


def tissue(result: PosteriorSamples) -> Bool[torch.Tensor, "H W"]:
    """Where there is something to be uncertain about, rather than air."""
    return foreground_mask(result.images.mean(0).abs())


def reconstruct_volume(config: ReconstructionConfig, plan: Plan, prior) -> Path:
    """Sample every slice of a volume and write ``<volume>.h5``, ``<volume>_metrics.json`` and a PNG panel per slice.

    The ``.h5`` comes last, so its presence says that the volume is complete. Returns its path.
    """
    started, network = time.monotonic(), _Timed(prior)
    volume, folder = plan.volume, Path(config.output)
    summaries, references = [], []
    with progress_view(volume.name, len(plan.slices) * 1000) as report:
        for number, index in enumerate(plan.slices):
            prepared = prepare(config, plan, index)

            def slice_progress(done: int, total: int, number: int = number) -> None:
                report(1000 * number + 1000 * done // total)

            result = reconstruct_slice(config, prepared.slice_, network, (volume.name, index), slice_progress)
            summary = summarise_slice(config, prepared, result)
            write_slice_panel(config, prepared, summary)
            summaries.append(summary if config.keep_samples else without_samples(summary))
            references.append(prepared.references)

    per_slice = {name: [summary.numbers[name] for summary in summaries] for name in summaries[0].numbers}
    log_diagnostics(config, volume.name, per_slice)
    images = {name: np.stack([s.images[name] for s in summaries]) for name in ("mean", "std", "lower", "upper")}
    reconstruction = np.abs(images["mean"]).astype(np.float32)
    # Against each reference there is; the two are never mixed.
    metrics = {name: image_metrics(target, reconstruction) for name, target in stack_references(references).items()}
    with atomic_path(folder / f"{volume.name}_metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    reconstructed = VolumeReconstruction(
        reconstruction=reconstruction,
        **images,
        samples=stack_samples(summaries) if config.keep_samples else None,
        level=config.level,
        slices=list(plan.slices),
        attrs={
            "config": dump_config(config),
            "seed": config.seed,
            "version": __version__,
            "prior": config.prior.name,
            "prior_digest": prior_digest(config.prior.name),
            "sigma_min": config.sampler.sigma_min,
            "n_evaluations": result.n_evaluations,
            "network_seconds": network.seconds,
            "total_seconds": time.monotonic() - started,
            "simulated": "simulated_noise_std" in volume.attrs,
            **per_slice,
        },
        diagnostics={name: np.stack([s.diagnostics[name] for s in summaries]) for name in summaries[0].diagnostics},
    )
    output = folder / f"{volume.name}.h5"
    write_reconstruction(output, reconstructed)
    log.info("%s written: %s", output, _one_line(metrics))
    return output


def summarise_slice(config: ReconstructionConfig, prepared: PreparedSlice, result: PosteriorSamples) -> SliceSummary:
    """Everything that is written of one slice: its images, its diagnostics and what the sampler says of itself."""
    diagnosed = slice_diagnostics(result, tissue(result))
    maps = {
        name: prepared.map_to_file(image.cpu().numpy(), unit=name.startswith("mcse")).astype(np.float32)
        for name, image in diagnosed.maps.items()
    }
    numbers = {
        "noise_std": prepared.slice_.noise_std,
        "scale": prepared.slice_.scale,
        "n_samples": len(result.images),
        **result.report,
        **diagnosed.numbers,
    }
    return SliceSummary(summarise(prepared.to_file(result.images.cpu().numpy()), config.level), maps, numbers)


def without_samples(summary: SliceSummary) -> SliceSummary:
    """Memory for many slices' samples is spent only if they are written."""
    return replace(summary, images={name: image for name, image in summary.images.items() if name != "samples"})


def stack_samples(summaries: list[SliceSummary]) -> Complex64[np.ndarray, "slice sample H W"]:
    """The first samples of every slice, as many as all of them have."""
    common = min(len(summary.images["samples"]) for summary in summaries)
    return np.stack([summary.images["samples"][:common] for summary in summaries])


def log_diagnostics(config: ReconstructionConfig, name: str, per_slice: dict[str, list[float]]) -> None:
    """One line on how well the samples know the posterior, then warnings of what is wrong with them."""
    error = np.median(per_slice["mcse_std_relative"])
    line = f"{name}: Monte-Carlo error of the standard deviation {100 * error:.0f} % (median over tissue)"
    if "median_rhat" in per_slice:
        line += f", R-hat of the chains {np.median(per_slice['median_rhat']):.2f}"
    if "median_ess" in per_slice:
        line += f", their effective sample size {np.median(per_slice['median_ess']):.0f}"
    log.info("%s", line)
    worst = {"disagreeing_share": np.mean, "stuck_share": np.max}
    for fault in chain_faults({key: float(of(per_slice[key])) for key, of in worst.items() if key in per_slice}):
        log.warning("%s", fault)
    smallest = min(per_slice.get("effective_size", [1.0]))
    if smallest < 0.1:
        log.warning(
            "tempered_smc: the effective sample size fell to %.2f of the population, so its samples descend from few "
            "draws of the prior: raise samples and sampler.levels, or use annealed_langevin",
            smallest,
        )
    if config.std_tolerance is not None and max(per_slice["mcse_std_relative"]) >= config.std_tolerance:
        log.warning("std_tolerance %g was not met by most_samples %d", config.std_tolerance, config.most_samples)


def summarise(samples: Complex[np.ndarray, "n h w"], level: float) -> dict[str, np.ndarray]:
    """Posterior mean, and the spread and interval of the magnitude, pixel by pixel."""
    magnitude = np.abs(samples)
    lower, upper = credible_interval(magnitude, level, nonnegative=True)
    return {
        "samples": samples.astype(np.complex64),
        "mean": samples.mean(axis=0).astype(np.complex64),
        "std": magnitude.std(axis=0, ddof=1).astype(np.float32),
        "lower": lower.astype(np.float32),
        "upper": upper.astype(np.float32),
    }


def write_slice_panel(config: ReconstructionConfig, prepared: PreparedSlice, summary: SliceSummary) -> None:
    """One PNG per slice beside the volume's ``.h5``."""
    volume, images = prepared.volume, summary.images
    acceleration = float(1 / prepared.slice_.mask.float().mean())
    panel = PanelImages(
        zero_filled=np.abs(prepared.to_file(np.asarray(BASELINES["zero_filled"](prepared.slice_)))),
        mean=np.abs(images["mean"]),
        std=images["std"],
        width=images["upper"] - images["lower"],
        samples=list(np.abs(images["samples"][:2])),
        target=prepared.target,
        title=panel_title(volume.name, prepared.index, len(images["samples"]), acceleration),
        level=config.level,
        simulated="simulated_noise_std" in volume.attrs,
    )
    write_panel(Path(config.output) / f"{volume.name}_slice{prepared.index:03d}.png", panel)


def check_output(config: ReconstructionConfig, plans: list[Plan]) -> None:
    """Refuse an output folder that cannot be written, or a disk too small for the results, before any work is done.

    Raises
    ------
    UserError: naming the folder.
    """
    folder = Path(config.output)
    for plan in plans:
        if (folder / f"{plan.volume.name}.h5").resolve() == plan.volume.path.resolve():
            raise UserError(f"{plan.volume.path}: the result would replace its own input: choose another --output")
    most = config.samples if config.std_tolerance is None else config.most_samples
    # In float32: four maps and four of diagnostics, complex mean, complex samples.
    images = 10 + 2 * most * config.keep_samples
    pixels = sum(len(plan.slices) * plan.volume.recon_shape[0] * plan.volume.recon_shape[1] for plan in plans)
    require_writable(folder)
    require_free_space(folder, 4 * images * pixels + 2**20 * len(plans))


class _Timed:
    """A prior that knows how long its evaluations took."""

    def __init__(self, prior):
        self.prior = prior
        self.seconds = 0.0

    def __call__(self, x, sigma):
        started = time.monotonic()
        denoised = self.prior(x, sigma)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        self.seconds += time.monotonic() - started
        return denoised


def _one_line(metrics: dict[str, dict[str, float]]) -> str:
    if not metrics:
        return "no reference in the file, so no metrics"
    return "; ".join(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in m.items()) for name, m in metrics.items())
