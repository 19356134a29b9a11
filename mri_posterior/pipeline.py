"""The main job: a prepared volume in; posterior samples, their summary, metrics and pictures out."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Complex

from mri_posterior import __version__
from mri_posterior.baselines import BASELINES
from mri_posterior.config import ReconstructionConfig, dump_config
from mri_posterior.device import pick_device
from mri_posterior.diagnostics import DISAGREE, disagreeing_share
from mri_posterior.errors import UserError
from mri_posterior.files import atomic_path, require_free_space, require_writable
from mri_posterior.metrics import credible_interval, image_metrics
from mri_posterior.operator import SenseOperator
from mri_posterior.panels import PanelImages, panel_title, write_panel
from mri_posterior.posterior import Posterior, PosteriorSamples, join_batches
from mri_posterior.preparation import Plan, PreparedSlice, prepare, stack_references
from mri_posterior.priors import prior_files
from mri_posterior.progress import progress_view
from mri_posterior.samplers import sample
from mri_posterior.slices import MultiCoilSlice
from mri_posterior.volumes import VolumeReconstruction, write_reconstruction

log = logging.getLogger("mri_posterior")


def reconstruct_slice(
    config: ReconstructionConfig, slice_: MultiCoilSlice, prior, key: tuple, report=lambda done, total: None
) -> PosteriorSamples:
    """Posterior samples of one slice, in its normalised units."""
    device = pick_device(config.device)
    operator = SenseOperator(slice_.maps.to(device), slice_.mask.to(device))
    posterior = Posterior(prior, operator, slice_.kspace.to(device), slice_.noise_std)
    start = torch.from_numpy(np.asarray(BASELINES[config.warm_start](slice_))).to(device, torch.complex64)
    batches = []
    for first in range(0, config.samples, config.batch):
        n = min(config.batch, config.samples - first)

        def progress(done: int, total: int, first: int = first, n: int = n) -> None:
            report(first * total + n * done, config.samples * total)

        result = sample(
            config.sampler, posterior, n, config.seed, key=key, first=first, warm_start=start, progress=progress
        )
        batches.append(result)
    return join_batches(batches)


def reconstruct_volume(config: ReconstructionConfig, plan: Plan, prior) -> Path:
    """Sample every slice of a volume and write ``<volume>.h5``, ``<volume>_metrics.json`` and a PNG panel per slice.

    The ``.h5`` comes last, so its presence says that the volume is complete. Returns its path.
    """
    started, network = time.monotonic(), _Timed(prior)
    volume, folder = plan.volume, Path(config.output)
    kept: dict[str, list] = {name: [] for name in ("mean", "std", "lower", "upper", "samples")}
    references = []
    per_slice: dict[str, list] = defaultdict(list)
    with progress_view(volume.name, len(plan.slices) * 1000) as report:
        for number, index in enumerate(plan.slices):
            prepared = prepare(config, plan, index)

            def slice_progress(done: int, total: int, number: int = number) -> None:
                report(1000 * number + 1000 * done // total)

            result = reconstruct_slice(config, prepared.slice_, network, (volume.name, index), slice_progress)
            summary = summarise(prepared.to_file(result.images.cpu().numpy()), config.level)
            for name, value in summary.items():
                kept[name].append(value)
            references.append(prepared.references)
            numbers = {"noise_std": prepared.slice_.noise_std, "scale": prepared.slice_.scale, **slice_report(result)}
            for name, value in numbers.items():
                per_slice[name].append(value)
            write_slice_panel(config, prepared, summary)

    warn_of_disagreement(per_slice)
    reconstruction = np.abs(np.stack(kept["mean"])).astype(np.float32)
    # Against each reference there is; the two are never mixed.
    metrics = {name: image_metrics(target, reconstruction) for name, target in stack_references(references).items()}
    with atomic_path(folder / f"{volume.name}_metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    reconstructed = VolumeReconstruction(
        reconstruction=reconstruction,
        **{name: np.stack(kept[name]) for name in ("mean", "std", "lower", "upper")},
        samples=np.stack(kept["samples"]) if config.keep_samples else None,
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
    )
    output = folder / f"{volume.name}.h5"
    write_reconstruction(output, reconstructed)
    log.info("%s written: %s", output, _one_line(metrics))
    return output


def slice_report(result: PosteriorSamples) -> dict[str, float]:
    """What the sampler says of its result, and whether its chains agree."""
    report = dict(result.report)
    if result.chains is not None:
        report["disagreeing_share"] = disagreeing_share(result.chains)
    return report


def warn_of_disagreement(per_slice: dict[str, list[float]]) -> None:
    """Log when chains remember where they came from, or when a population is too small for its posterior."""
    disagreeing = np.mean(per_slice.get("disagreeing_share", [0.0]))
    if disagreeing > 0.05:
        log.warning(
            "chains disagree (R-hat above %g) in %.0f %% of the pixels: raise sampler.final_steps; where that does not "
            "help the posterior has several modes, whose shares only sampler.name=tempered_smc finds",
            DISAGREE,
            100 * disagreeing,
        )
    smallest = min(per_slice.get("effective_size", [1.0]))
    if smallest < 0.1:
        log.warning(
            "tempered_smc: the effective sample size fell to %.2f of the population, so its samples descend from few "
            "draws of the prior: raise samples and sampler.levels, or use annealed_langevin",
            smallest,
        )


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


def write_slice_panel(config: ReconstructionConfig, prepared: PreparedSlice, summary: dict[str, np.ndarray]) -> None:
    """One PNG per slice beside the volume's ``.h5``."""
    volume, mask = prepared.volume, prepared.slice_.mask
    simulated = "simulated_noise_std" in volume.attrs
    panel = PanelImages(
        zero_filled=np.abs(prepared.to_file(np.asarray(BASELINES["zero_filled"](prepared.slice_)))),
        mean=np.abs(summary["mean"]),
        std=summary["std"],
        width=summary["upper"] - summary["lower"],
        samples=list(np.abs(summary["samples"][:2])),
        target=prepared.target,
        title=panel_title(volume.name, prepared.index, config.samples, float(1 / mask.float().mean())),
        level=config.level,
        simulated=simulated,
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
    images = 6 + 2 * config.samples * config.keep_samples  # in float32: four maps, complex mean, complex samples
    pixels = sum(len(plan.slices) * plan.volume.recon_shape[0] * plan.volume.recon_shape[1] for plan in plans)
    require_writable(folder)
    require_free_space(folder, 4 * images * pixels + 2**20 * len(plans))


def prior_digest(name: str) -> str:
    """SHA-256 of the prior's files, so that an output says which prior made it."""
    digest = hashlib.sha256()
    for path in prior_files(name):
        digest.update(path.read_bytes())
    return digest.hexdigest()


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
