"""Training images on disk: one small HDF5 file per volume, and the training data that a folder of them makes.

A volume's file holds ``images`` ``[slice, H, W]``, complex64 or, from magnitude volumes, float32, each slice scaled as
reconstruction scales a scan (99th percentile of the magnitude about 1); ``slice_index``, ``noise_std`` (per real
channel, in the units of `images`; NaN where unknown) and ``scale`` (back to the source's units), ``[slice]`` each; and,
in its attributes, the patient, the ``split`` that the patient belongs to and where the volume came from. Volumes may
differ in size. Slices lie in the file one after the other, so that one is read without the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
from jaxtyping import Complex, Float, Int

from mri_posterior.augmentation import SCALE_JITTER, mirror_some, move, recolour, scan, some, strip_some, window
from mri_posterior.errors import UserError
from mri_posterior.files import atomic_path
from mri_posterior.noise import stable_seed

FORMAT = "mri_posterior training volume 1"
PHASE_JITTER = 0.1  # radians; the image's mean phase is known at reconstruction, but for noise
_ARRAYS = ("images", "slice_index", "noise_std", "scale")


@dataclass(frozen=True)
class Provenance:
    """Whose images these are and how they were made.

    Attributes
    ----------
    patient, split: all volumes of a patient are of one split.
    voxel_size_mm: (row, column) spacing of the images.
    source, source_bytes: name and size of the file that they were made from.
    acquisition, licence: as the source or the user names them.
    settings: JSON text of what else the images depend on.
    """

    patient: str
    split: Literal["train", "val"]
    voxel_size_mm: tuple[float, float]
    source: str
    source_bytes: int
    acquisition: str
    licence: str
    settings: str


@dataclass(frozen=True, eq=False)
class TrainingVolume:
    """The slices of one volume that are fit to train on; see the module for units."""

    images: Complex[np.ndarray, "slice H W"] | Float[np.ndarray, "slice H W"]
    slice_index: Int[np.ndarray, " slice"]
    noise_std: Float[np.ndarray, " slice"]
    scale: Float[np.ndarray, " slice"]
    provenance: Provenance


def write_training_volume(path: str | Path, volume: TrainingVolume) -> None:
    """Write one volume's file, whole or not at all; the same volume gives the same bytes.

    Raises
    ------
    UserError: the folder cannot be written or the disk is full.
    """
    with atomic_path(path) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                for name in _ARRAYS:
                    file.create_dataset(name, data=getattr(volume, name))
                file.attrs.update({"format": FORMAT} | vars(volume.provenance))
        except (OSError, RuntimeError) as error:  # HDF5 raises either, with a text of many lines
            raise OSError("the disk is full or failing") from error


def read_provenance(path: str | Path) -> tuple[Provenance, int]:
    """What a training volume says of itself, and its number of slices, without reading its images.

    Raises
    ------
    UserError: the file is missing, damaged or not a training volume.
    """
    with _opened(path) as file:
        attrs = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in file.attrs.items()}
        names = [field.name for field in fields(Provenance)]
        missing = [name for name in names if name not in attrs] + [name for name in _ARRAYS if name not in file]
        if attrs.get("format") != FORMAT or missing or attrs["split"] not in ("train", "val"):
            raise UserError(f"{path}: not a training volume: give what prepare_training wrote")
        known = {name: attrs[name] for name in names} | {"voxel_size_mm": tuple(attrs["voxel_size_mm"])}
        return Provenance(**known), len(file["images"])


def read_training_slice(path: str | Path, index: int) -> Complex[np.ndarray, "H W"] | Float[np.ndarray, "H W"]:
    """One slice of a training volume, complex64 or float32, scaled to a 99th percentile of about 1.

    Raises
    ------
    UserError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return file["images"][index]


class ComplexSlices:
    """Training data from the files that ``prepare_training`` wrote: complex images as scanned, or magnitude volumes.

    Slices are read when they are drawn, so a data set may be far larger than the memory. Complex slices are mirrored,
    conjugated, turned by a small common phase and scaled at random; magnitude slices get the augmentation and phase
    that `MagnitudeSlices` gives them. Then a window of the wanted size is cut out at random, padded with zeros where
    the slice is smaller. Held-out slices are neither augmented nor rescaled.

    Image `i` of a batch depends on the batch's key and `i` alone.

    Parameters
    ----------
    path: a training volume or a folder; all of its ``*.h5`` count, in subfolders too.

    Raises
    ------
    UserError: no such file, a file that is not a training volume, a patient in both splits, or a split without one.
    """

    def __init__(self, path: str | Path | None):
        self._slices: dict[bool, list[tuple[Path, int]]] = {False: [], True: []}
        patients: dict[str, tuple[str, Path]] = {}
        for file in _training_files(path):
            provenance, n_slices = read_provenance(file)
            split, first = patients.setdefault(provenance.patient, (provenance.split, file))
            if split != provenance.split:
                raise UserError(
                    f"{file}: patient {provenance.patient} is for {provenance.split}, but for {split} in {first}: "
                    "prepare both with the same validation_share"
                )
            self._slices[split == "val"] += [(file, index) for index in range(n_slices)]
        for held_out, purpose, remedy in ((False, "train", "lower"), (True, "validate", "raise")):
            if not self._slices[held_out]:
                raise UserError(
                    f"{path}: none of its {len(patients)} patients is there to {purpose} on: "
                    f"{remedy} validation_share of prepare_training or add patients"
                )

    def batch(
        self, key: tuple, n: int, crop: tuple[int, int], *, held_out: bool = False
    ) -> Complex[torch.Tensor, "n H W"]:
        return torch.stack([self._draw(stable_seed("complex", *key, i), crop, held_out) for i in range(n)])

    def _draw(self, seed: int, crop: tuple[int, int], held_out: bool) -> Complex[torch.Tensor, "H W"]:
        generator = torch.Generator().manual_seed(seed)
        pool = self._slices[held_out]
        path, index = pool[int(torch.randint(len(pool), (), generator=generator))]
        image = torch.from_numpy(read_training_slice(path, index))[None]
        if not image.is_complex():
            image = _simulated_scan(image, generator, augment=not held_out)
        elif not held_out:
            image = _another_scan(image, generator)
        return window(image, crop, generator)[0]


def _another_scan(images: Complex[torch.Tensor, "n H W"], generator: torch.Generator) -> Complex[torch.Tensor, "n H W"]:
    """Other scans that would be as likely: mirrored, with the field's phase reversed, and with another scale."""
    n = len(images)
    images = mirror_some(images, generator)
    images = torch.where(some(n, 0.5, generator)[:, None, None], images.conj(), images)
    size = torch.exp(SCALE_JITTER * torch.randn(n, 1, 1, generator=generator))
    return images * torch.polar(size, PHASE_JITTER * torch.randn(n, 1, 1, generator=generator))


def _simulated_scan(
    images: Float[torch.Tensor, "n H W"], generator: torch.Generator, *, augment: bool
) -> Complex[torch.Tensor, "n H W"]:
    """Whole slices, not windows of them, because contrast and scale are defined by the whole."""
    if augment:
        images = mirror_some(strip_some(images, generator), generator)
        images = recolour(move(images, generator), generator)
    return scan(images, generator, jitter=augment)


def _training_files(path: str | Path | None) -> list[Path]:
    hint = "give --input a training volume or a folder of them, as prepare_training writes"
    if path is None or not Path(path).exists():
        raise UserError(f"training images {path}: no such file or folder: {hint}")
    path = Path(path)
    found = [file for file in path.rglob("*.h5") if file.name[0] != "."] if path.is_dir() else [path]
    if not found:
        raise UserError(f"{path}: the folder holds no .h5 files: {hint}")
    return sorted(found)


@contextmanager
def _opened(path: str | Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{path}: missing or damaged: delete it and run prepare_training again") from error
