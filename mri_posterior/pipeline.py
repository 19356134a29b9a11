"""The whole way of the data: a k-space volume in, posterior samples and their summary out."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Complex, Float

from mri_posterior import __version__
from mri_posterior.baselines import BASELINES
from mri_posterior.config import ReconstructionConfig, dump_config
from mri_posterior.embedded import sample_volume
from mri_posterior.errors import UserError
from mri_posterior.files import atomic_path, require_free_space, require_writable
from mri_posterior.masks import make_mask
from mri_posterior.measurement import centre_crop, prepare_slice, resample
from mri_posterior.metrics import credible_interval, image_metrics
from mri_posterior.operator import SenseOperator
from mri_posterior.panels import PanelImages, panel_title, write_panel
from mri_posterior.posterior import Posterior
from mri_posterior.priors import NetworkPrior, prior_folder
from mri_posterior.progress import progress_view
from mri_posterior.samplers import sample
from mri_posterior.slices import MultiCoilSlice
from mri_posterior.volumes import (
    Volume,
    VolumeReconstruction,
    list_volumes,
    open_volume,
    read_kspace,
    read_target,
    write_reconstruction,
)

log = logging.getLogger("mri_posterior")


@dataclass(frozen=True)
class Plan:
    """One volume, checked and ready to go: which slices, on which grid."""

    volume: Volume
    slices: range
    rows: int
    grid: tuple[int, int] | None


def input_volumes(config: ReconstructionConfig) -> list[Path]:
    """The files that a configuration names, or the embedded simulated volume.

    Raises
    ------
    UserError: no input and no sample named, or no volume found.
    """
    if config.input is not None:
        return list_volumes(config.input)
    if config.sample is None:
        raise UserError("no data: give --input FILE_OR_DIR, or set sample to knee or brain for the simulated volume")
    return [sample_volume(config.sample)]


def plan_volume(config: ReconstructionConfig, path: Path, prior: NetworkPrior) -> Plan:
    """Open a volume and settle slices and resolution before anything is computed.

    Raises
    ------
    UserError: an unreadable volume, slices that do not exist, unknown voxel size, or voxels larger than the prior
    knows.
    """
    volume = open_volume(path)
    first, last = config.slices or (0, volume.n_slices)
    if not 0 <= first < last <= volume.n_slices:
        raise UserError(f"{path}: has slices 0 to {volume.n_slices - 1}: set slices to [first, last + 1] within that")
    rows = volume.recon_shape[0] if volume.readout_oversampled else volume.shape[0]
    return Plan(volume, range(first, last), rows, prior_grid(config, volume, (rows, volume.shape[1]), prior))


def prior_grid(
    config: ReconstructionConfig, volume: Volume, shape: tuple[int, int], prior: NetworkPrior
) -> tuple[int, int] | None:
    """The part of k-space that the prior can speak about: None for all, fewer rows and columns for finer data.

    A prior knows anatomy at the voxel sizes it was trained on. Finer data are cropped to its k-space centre;
    coarser data are refused.
    """
    voxel = volume.voxel_size_mm
    if voxel is None:
        if config.prior.assumed_voxel_size_mm is None:
            raise UserError(f"{volume.path}: the header gives no field of view: set prior.assumed_voxel_size_mm")
        voxel = (config.prior.assumed_voxel_size_mm,) * 2
        log.info("%s: no field of view in the header, assuming %g mm voxels", volume.name, voxel[0])
    finest, coarsest = prior.config.voxel_size_mm
    if max(voxel) > 1.02 * coarsest:
        raise UserError(
            f"{volume.path}: {voxel[0]:.2g} x {voxel[1]:.2g} mm voxels, but prior {config.prior.name} knows "
            f"{finest:g} to {coarsest:g} mm: set prior.name to a prior of that resolution"
        )
    if min(voxel) >= 0.98 * finest:
        return None
    nominal = (finest * coarsest) ** 0.5
    grid = tuple(min(n, 2 * round(n * v / nominal / 2)) for n, v in zip(shape, voxel, strict=True))
    log.info("%s: reconstructing the centre %dx%d of %dx%d k-space, %.2g mm", volume.name, *grid, *shape, nominal)
    return grid


@dataclass(frozen=True)
class PreparedSlice:
    """A slice ready for inference and what is needed to return its images to the file.

    Attributes
    ----------
    slice_: the measurement, in normalised units.
    everything: coil-combined image of the whole k-space of the file (`prepare_slice`); for evaluation only.
    target: the file's reference image, if any.
    """

    volume: Volume
    index: int
    slice_: MultiCoilSlice
    everything: Complex[np.ndarray, "h w"]
    target: Float[np.ndarray, "H W"] | None
    rows: int

    def to_file(self, images: Complex[np.ndarray, "*batch h w"]) -> Complex[np.ndarray, "*batch H W"]:
        """Images in the file's units, on the file's grid, cropped as fastMRI crops."""
        weighted = images * self.slice_.weight.numpy() * np.float32(self.slice_.scale)
        return centre_crop(resample(weighted, (self.rows, self.volume.shape[1])), self.volume.recon_shape)

    @property
    def combined(self) -> Float[np.ndarray, "H W"] | None:
        """Magnitude of the fully sampled coil-combined image, where the scan was fully sampled."""
        return None if self.volume.mask is not None else np.abs(self.to_file(self.everything))


def prepare(config: ReconstructionConfig, plan: Plan, index: int) -> PreparedSlice:
    """Read one slice, undersample it as configured and build its measurement model.

    Raises
    ------
    UserError: naming file and slice.
    """
    volume = plan.volume
    kspace = read_kspace(volume, index)
    mask = volume.mask if volume.mask is not None else make_mask(config.mask, volume.shape, volume.path.name)
    try:
        slice_, everything = prepare_slice(kspace, mask, plan.rows, plan.grid, config.coils, config.noise)
    except UserError as error:
        raise UserError(f"{volume.path}, slice {index}: {error}") from error
    rows = plan.rows if plan.grid else slice_.mask.shape[0]
    return PreparedSlice(volume, index, slice_, everything, read_target(volume, index), rows)


def reconstruct_slice(
    config: ReconstructionConfig, slice_: MultiCoilSlice, prior, key: tuple, report=lambda done, total: None
) -> tuple[Complex[torch.Tensor, "n H W"], int]:
    """Posterior samples of one slice in its normalised units, and network evaluations per sample."""
    device = pick_device(config.device)
    operator = SenseOperator(slice_.maps.to(device), slice_.mask.to(device))
    posterior = Posterior(prior, operator, slice_.kspace.to(device), slice_.noise_std)
    start = torch.from_numpy(np.asarray(BASELINES[config.warm_start](slice_))).to(device, torch.complex64)
    batches, evaluations = [], 0
    for first in range(0, config.samples, config.batch):
        n = min(config.batch, config.samples - first)

        def progress(done: int, total: int, first: int = first, n: int = n) -> None:
            report(first * total + n * done, config.samples * total)

        result = sample(
            config.sampler, posterior, n, config.seed, key=key, first=first, warm_start=start, progress=progress
        )
        batches.append(result.images.cpu())
        evaluations = result.n_evaluations
    return torch.cat(batches), evaluations


def reconstruct_volume(config: ReconstructionConfig, plan: Plan, prior) -> Path:
    """Sample every slice of a volume and write ``<volume>.h5``, ``<volume>_metrics.json`` and a PNG panel per slice.

    The ``.h5`` comes last, so its presence says that the volume is complete. Returns its path.
    """
    started, network = time.monotonic(), _Timed(prior)
    volume, folder = plan.volume, Path(config.output)
    kept: dict[str, list] = {name: [] for name in ("mean", "std", "lower", "upper", "samples")}
    references: dict[str, list] = {"rss": [], "coil_combined": []}
    per_slice: dict[str, list] = {"noise_std": [], "scale": []}
    evaluations = 0
    with progress_view(volume.name, len(plan.slices) * 1000) as report:
        for number, index in enumerate(plan.slices):
            prepared = prepare(config, plan, index)

            def slice_progress(done: int, total: int, number: int = number) -> None:
                report(1000 * number + 1000 * done // total)

            images, evaluations = reconstruct_slice(
                config, prepared.slice_, network, (volume.name, index), slice_progress
            )
            summary = summarise(prepared.to_file(images.numpy()), config.level)
            for name, value in summary.items():
                kept[name].append(value)
            references["rss"].append(prepared.target)
            references["coil_combined"].append(prepared.combined)
            per_slice["noise_std"].append(prepared.slice_.noise_std)
            per_slice["scale"].append(prepared.slice_.scale)
            write_slice_panel(config, prepared, summary)

    reconstruction = np.abs(np.stack(kept["mean"])).astype(np.float32)
    metrics = volume_metrics(reconstruction, references)
    with atomic_path(folder / f"{volume.name}_metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    result = VolumeReconstruction(
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
            "n_evaluations": evaluations,
            "network_seconds": network.seconds,
            "total_seconds": time.monotonic() - started,
            "simulated": "simulated_noise_std" in volume.attrs,
            **per_slice,
        },
    )
    output = folder / f"{volume.name}.h5"
    write_reconstruction(output, result)
    log.info("%s written: %s", output, _one_line(metrics))
    return output


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


def volume_metrics(
    reconstruction: Float[np.ndarray, "slice h w"], references: dict[str, list]
) -> dict[str, dict[str, float]]:
    """fastMRI's metrics against each reference there is; the two are never mixed."""
    return {
        name: image_metrics(np.stack(images), reconstruction)
        for name, images in references.items()
        if all(image is not None for image in images)
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
    images = 4 + 2 * config.samples * config.keep_samples  # float32 maps, and complex64 samples
    pixels = sum(len(plan.slices) * plan.volume.recon_shape[0] * plan.volume.recon_shape[1] for plan in plans)
    require_writable(folder)
    require_free_space(folder, 4 * images * pixels)


def pick_device(name: str) -> torch.device:
    """``auto`` prefers CUDA, then MPS.

    Raises
    ------
    UserError: a device that this machine does not have.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        raise UserError(f"device {name}: not available on this machine: use --device auto or cpu")
    return torch.device(name)


def prior_digest(name: str) -> str:
    """SHA-256 of the prior's weights, so that an output says which prior made it."""
    return hashlib.sha256((prior_folder(name) / "model.safetensors").read_bytes()).hexdigest()


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
