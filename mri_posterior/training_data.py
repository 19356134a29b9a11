"""Clean complex images to train a prior on: magnitude slices with simulated phase, or endless phantoms.

Training images are scaled as a scan is at reconstruction (99th percentile of the magnitude about 1, with
jitter because a scan's own estimate is noisy) and carry the phase that is left once the low-resolution
phase has been moved into the coil maps: smooth and mostly small.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Complex, Float
from scipy import ndimage
from torch.nn import functional

from mri_posterior.errors import UserError
from mri_posterior.noise import stable_seed

PHASE_RMS = 0.25  # radians; drawn from an exponential with this mean, so that a few images have much
STRIPPED = 0.15  # fraction of draws without scalp and skull, as brain-extracted volumes are
BIAS_RMS = 0.12  # log receive-field non-uniformity left by coils whose sensitivities were not measured
SCALE_JITTER = 0.2  # log


class TrainingData(Protocol):
    """`batch(key, n, crop)` draws `n` clean images that depend on `key` alone; `held_out` does so from other
    subjects.
    """

    def batch(
        self, key: tuple, n: int, crop: tuple[int, int], *, held_out: bool = False
    ) -> Complex[torch.Tensor, "n H W"]: ...


class MagnitudeSlices:
    """Magnitude slices of many subjects, split by subject: HDF5 with ``images`` ``[slice, H, W]`` (uint8 or float),
    ``subject_index`` ``[slice]`` and ``split`` ``[subject]`` (``train`` / ``val``).

    Augmentation: left-right mirror, shifts, in half of the draws a small rotation and zoom (resampling
    blurs, so the other half stays as it is), gamma, smooth bias field, smooth phase, scale jitter.

    Raises
    ------
    UserError: the file or one of its datasets is missing.
    """

    def __init__(self, path: str | Path | None):
        import h5py

        if path is None or not Path(path).is_file():
            raise UserError(
                f"training images {path}: no such file: give --input FILE (HDF5 with images, subject_index, split)"
            )
        try:
            with h5py.File(path) as file:
                images = torch.from_numpy(np.asarray(file["images"]))
                subject = np.asarray(file["subject_index"])
                split = np.asarray(file["split"]).astype(str)
        except (OSError, KeyError) as error:
            raise UserError(
                f"{path}: not a training set ({error}): it needs images, subject_index and split"
            ) from error
        self._integer = not images.is_floating_point()
        # Slices with next to no head have no 99th percentile worth dividing by.
        signal = (images > 0.1 * images.max()).float().mean(dim=(1, 2)).numpy()
        is_train = split[subject] == "train"
        self._images = {False: images[is_train & (signal > 0.05)], True: images[~is_train & (signal > 0.05)]}

    def batch(self, key, n, crop, *, held_out=False):
        generator = torch.Generator().manual_seed(stable_seed("magnitude", *key))
        pool = self._images[held_out]
        images = pool[torch.randint(len(pool), (n,), generator=generator)].float()
        if self._integer:  # grey levels are 8-bit: spread each over its own width
            images = (images + torch.rand(images.shape, generator=generator) - 0.5).clamp_min(0)
        images = images / _percentile(images)
        if not held_out:
            images = _strip_some(images, generator)
        images = _place(images, crop, generator, geometry=not held_out)
        return _complex_image(images, generator, contrast=not held_out, jitter=not held_out)


class KneePhantoms:
    """Simulated knees without end (`phantoms.knee_phantom`), for the embedded sample volume's prior."""

    def batch(self, key, n, crop, *, held_out=False):
        from mri_posterior.phantoms import knee_phantom

        seed = stable_seed("knee", held_out, *key)
        generator = torch.Generator().manual_seed(seed)
        numpy_generator = np.random.default_rng(seed)
        size = max(160, *crop)
        images = torch.from_numpy(np.stack([knee_phantom((size, size), numpy_generator) for _ in range(n)]))
        images = images / _percentile(images)
        rows = torch.randint(size - crop[0] + 1, (n,), generator=generator).tolist()
        columns = torch.randint(size - crop[1] + 1, (n,), generator=generator).tolist()
        cropped = [im[r : r + crop[0], c : c + crop[1]] for im, r, c in zip(images, rows, columns, strict=True)]
        return _complex_image(torch.stack(cropped), generator, contrast=False, jitter=not held_out)


def _percentile(images: Float[torch.Tensor, "n H W"]) -> Float[torch.Tensor, "n 1 1"]:
    return images.flatten(1).quantile(0.99, dim=1)[:, None, None].clamp_min(1e-6)


def _strip_some(images, generator):
    """Blank a rim of random thickness around the head in a few images: roughly what brain extraction leaves."""
    chosen = torch.rand(len(images), generator=generator) < STRIPPED
    rims = 6 + 5 * torch.rand(len(images), generator=generator)
    images = images.clone()
    for i in chosen.nonzero()[:, 0].tolist():
        head = ndimage.binary_fill_holes(ndimage.binary_opening(images[i].numpy() > 0.12))
        depth = torch.from_numpy(ndimage.distance_transform_edt(head)).float()
        images[i] *= (depth - rims[i]).clamp(0, 1)
    return images


def _place(images, crop, generator, *, geometry: bool):
    """Put each image into a frame of `crop` at a random offset; with `geometry`, mirror and resample some."""
    n, height, width = images.shape
    mirror = torch.rand(n, generator=generator) < 0.5
    images = torch.where(mirror[:, None, None], images.flip(-1), images)
    pad_rows, pad_columns = max(crop[0] - height, 0), max(crop[1] - width, 0)
    images = functional.pad(
        images, (pad_columns // 2, pad_columns - pad_columns // 2, pad_rows // 2, pad_rows - pad_rows // 2)
    )
    top, left = (images.shape[-2] - crop[0]) // 2, (images.shape[-1] - crop[1]) // 2
    images = images[:, top : top + crop[0], left : left + crop[1]]
    if not geometry:
        return images
    shifts = torch.randint(-4, 5, (n, 2), generator=generator).tolist()
    images = torch.stack([torch.roll(im, tuple(s), dims=(0, 1)) for im, s in zip(images, shifts, strict=True)])
    angle = (torch.rand(n, generator=generator) - 0.5) * math.radians(20)
    zoom = torch.exp((torch.rand(n, generator=generator) - 0.5) * 0.3)
    aspect = crop[0] / crop[1]
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = zoom * angle.cos(), -zoom * angle.sin() * aspect
    theta[:, 1, 0], theta[:, 1, 1] = zoom * angle.sin() / aspect, zoom * angle.cos()
    grid = functional.affine_grid(theta, (n, 1, *crop), align_corners=False)
    resampled = functional.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False)[:, 0].clamp_min(0)
    keep = torch.rand(n, generator=generator) < 0.5
    return torch.where(keep[:, None, None], images, resampled)


def _complex_image(images, generator, *, contrast: bool, jitter: bool) -> Complex[torch.Tensor, "n H W"]:
    n = len(images)
    if contrast:
        gamma = torch.exp(0.25 * torch.randn(n, generator=generator) * (torch.rand(n, generator=generator) < 0.5))
        images = images.clamp_min(0) ** gamma[:, None, None]
        images = images * torch.exp(BIAS_RMS * smooth_field(images.shape, generator))
        images = images / _percentile(images)
    if jitter:
        images = images * torch.exp(SCALE_JITTER * torch.randn(n, 1, 1, generator=generator))
    strength = -PHASE_RMS * torch.rand(n, 1, 1, generator=generator).clamp_min(1e-6).log()
    return torch.polar(images.float(), strength * smooth_field(images.shape, generator))


def smooth_field(shape: tuple[int, int, int], generator: torch.Generator) -> Float[torch.Tensor, "n H W"]:
    """Low-order smooth random fields of unit root mean square: the lowest 5x5 cosines, amplitude falling with order."""
    n, height, width = shape
    order = torch.arange(5, dtype=torch.float32)
    rows = torch.cos(math.pi * order[:, None] * (torch.arange(height) + 0.5) / height)
    columns = torch.cos(math.pi * order[:, None] * (torch.arange(width) + 0.5) / width)
    amplitude = 1 / (1 + order[:, None] ** 2 + order[None, :] ** 2)
    coefficients = amplitude * torch.randn(n, 5, 5, generator=generator)
    field = torch.einsum("nij,ih,jw->nhw", coefficients, rows, columns)
    return field / field.square().mean(dim=(1, 2), keepdim=True).sqrt()
