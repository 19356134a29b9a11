"""Two simulated multi-coil volumes, made on first use so that everything can be tried offline and without data.

They are laid out like fastMRI's multi-coil files and, unlike any scan, come with the truth: a noise-free
reference and the exact noise level.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import h5py
import numpy as np
from jaxtyping import Complex, Float

from mri_posterior.errors import UserError
from mri_posterior.files import atomic_path, require_free_space
from mri_posterior.phantoms import SAMPLE_HEIGHTS_MM, brain_slices, knee_phantom, smooth_phase

SampleName = Literal["knee", "brain"]

_VERSION = 1  # raise it with every change that alters the files: older ones in the cache are then made anew
_N_COILS = 8
_INTENSITY = 1e-4  # of fastMRI's order of magnitude, so that a forgotten scale shows
_NOISE = 0.015  # per real channel, relative to the 99th percentile of the images
_COUPLING = 0.2  # correlation of the noise of any two coils
_PHASE_RMS = 0.6  # radians


@dataclass(frozen=True)
class _Sample:
    """How one volume is made. `columns` are the phase encodes, more than the reconstruction keeps of them."""

    objects: Callable[[tuple[int, int]], Float[np.ndarray, "slices H W"]]
    recon: tuple[int, int]
    columns: int
    voxel_mm: float
    thickness_mm: float
    acquisition: str
    note: str


def _knees(shape: tuple[int, int]) -> Float[np.ndarray, "slices H W"]:
    # Chosen by eye: without fat suppression, from a posterior to an anterior one, whole leg within the frame.
    return np.stack([knee_phantom(shape, np.random.default_rng(seed)) for seed in (22, 6, 36, 1)])


def _brain(shape: tuple[int, int]) -> Float[np.ndarray, "slices H W"]:
    return brain_slices(shape, SAMPLE_HEIGHTS_MM)


_SAMPLES = {
    "knee": _Sample(
        objects=_knees,
        recon=(160, 160),
        columns=168,
        voxel_mm=1.0,
        thickness_mm=3.0,
        acquisition="SIMULATED coronal PD knee-like phantom",
        note="Simulated, not a scan and not a knee: each slice is a different phantom drawn at random.",
    ),
    "brain": _Sample(
        objects=_brain,
        recon=(120, 96),
        columns=96,
        voxel_mm=2.0,
        thickness_mm=2.0,
        acquisition="SIMULATED axial T1 brain (MNI152 template)",
        note="Simulated from the skull-stripped MNI152 average brain that nilearn ships: not a scan of a person.",
    ),
}


def sample_volume(name: SampleName, folder: Path | None = None) -> Path:
    """A fully sampled multi-coil volume to try things on, made within seconds on first use and then reused.

    ``simulated_knee.h5`` and ``simulated_brain.h5`` hold ``kspace`` complex64 ``[slice, coil, H, W]`` (4 slices,
    8 coils, readout along H oversampled twice), ``reconstruction_rss`` float32 from the noise-free coil images,
    and ``ismrmrd_header``. The attribute ``simulated_noise_std`` is the noise per real channel of the k-space.
    The same version makes the same volume everywhere, up to rounding.

    Parameters
    ----------
    name: ``knee`` needs nothing; ``brain`` needs nilearn.
    folder: where the file lies; by default `cache_folder`.

    Raises
    ------
    UserError: no sample of that name, the folder cannot be written, or nilearn is missing.
    """
    if name not in _SAMPLES:
        raise UserError(f"there is no sample volume '{name}': choose one of {', '.join(get_args(SampleName))}")
    path = (cache_folder() if folder is None else Path(folder)) / f"simulated_{name}.h5"
    recipe = f"mri_posterior {name} {_VERSION}"
    if _recipe_of(path) == recipe:
        return path
    content, attrs = _simulate(name, _SAMPLES[name])
    try:
        require_free_space(path.parent, sum(np.asarray(value).nbytes for value in content.values()) + 2**20)
        _write(path, content, attrs | {"recipe": recipe})
    except UserError as error:
        if folder is not None:
            raise
        raise UserError(f"{error} (MRI_POSTERIOR_CACHE chooses the folder of sample volumes)") from error
    return path


def cache_folder() -> Path:
    """Where sample volumes are kept: ``MRI_POSTERIOR_CACHE``, else ``mri_posterior`` in the user's cache folder.

    Raises
    ------
    UserError: the user has no home folder.
    """
    if chosen := os.environ.get("MRI_POSTERIOR_CACHE"):
        return Path(chosen)
    windows = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None
    if base := windows or os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "mri_posterior"
    try:
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mri_posterior"
    except RuntimeError:
        raise UserError("no home folder to keep sample volumes in: set MRI_POSTERIOR_CACHE to a folder") from None


def _recipe_of(path: Path) -> str | None:
    """The recipe that a file was made by; None if there is no such file or it is not one of ours."""
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("recipe"))
    except OSError:
        return None


def _simulate(name: str, sample: _Sample) -> tuple[dict[str, np.ndarray | bytes], dict[str, object]]:
    """The datasets and attributes of one volume."""
    height, width = sample.recon
    encoded = (2 * height, sample.columns)
    objects = _INTENSITY * sample.objects(sample.recon).astype(np.float64)
    noise_std = _NOISE * float(np.percentile(objects, 99))
    maps = _coil_maps(sample.recon)
    # The object ends with the field of view that is reconstructed; what is encoded beyond holds noise only.
    top, left = (encoded[0] - height) // 2, (encoded[1] - width) // 2
    padding = ((0, 0), (top, encoded[0] - height - top), (left, encoded[1] - width - left))

    kspace = np.empty((len(objects), _N_COILS, *encoded), np.complex64)
    target = np.empty(objects.shape, np.float32)
    for index, magnitude in enumerate(objects):
        rng = np.random.default_rng((_VERSION, index))
        coil_images = maps * magnitude * smooth_phase(sample.recon, rng, _PHASE_RMS)
        target[index] = np.sqrt(np.sum(np.abs(coil_images) ** 2, axis=0))
        kspace[index] = _centred_fft(np.pad(coil_images, padding)) + noise_std * _coupled_noise(encoded, rng)

    attrs = {
        "acquisition": sample.acquisition,
        "patient_id": f"simulated-{name}",
        "max": float(target.max()),
        "norm": float(np.linalg.norm(target)),
        "target_noise_free": True,
        "simulated_noise_std": noise_std,
        "note": sample.note,
    }
    return {"kspace": kspace, "reconstruction_rss": target, "ismrmrd_header": _header(sample, encoded)}, attrs


def _coil_maps(shape: tuple[int, int]) -> Complex[np.ndarray, "coils H W"]:
    """Sensitivities of straight wires around the object, ``sum_c |maps_c|^2 = 1``.

    A wire's field falls off with the distance and turns with the direction, which is one complex division.
    """
    y, x = ((np.arange(n) + 0.5) / n * 2 - 1 for n in shape)
    wires = 1.3 * np.exp(2j * np.pi * (np.arange(_N_COILS) + 0.5) / _N_COILS)
    maps = 1 / (x[None, None, :] + 1j * y[None, :, None] - wires[:, None, None])
    return maps / np.sqrt(np.sum(np.abs(maps) ** 2, axis=0))


def _coupled_noise(shape: tuple[int, int], rng: np.random.Generator) -> Complex[np.ndarray, "coils H W"]:
    """Complex noise of level 1 per real channel in each coil; a part of it is common to all, up to a phase per coil."""
    real = rng.standard_normal((2, _N_COILS + 1, *shape))
    white = real[0] + 1j * real[1]
    turn = np.exp(2j * np.pi * np.arange(_N_COILS) * 3 / _N_COILS)[:, None, None]
    return np.sqrt(1 - _COUPLING) * white[:-1] + np.sqrt(_COUPLING) * turn * white[-1]


def _centred_fft(images: Complex[np.ndarray, "coils H W"]) -> Complex[np.ndarray, "coils H W"]:
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images, axes=axes), axes=axes, norm="ortho"), axes=axes)


def _header(sample: _Sample, encoded: tuple[int, int]) -> bytes:
    def space(tag: str, shape: tuple[int, int]) -> str:
        fov = [n * sample.voxel_mm for n in shape]
        return (
            f"<{tag}><matrixSize><x>{shape[0]}</x><y>{shape[1]}</y><z>1</z></matrixSize>"
            f"<fieldOfView_mm><x>{fov[0]:g}</x><y>{fov[1]:g}</y><z>{sample.thickness_mm:g}</z></fieldOfView_mm></{tag}>"
        )

    columns = encoded[1]
    return f"""<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
 <acquisitionSystemInformation><receiverChannels>{_N_COILS}</receiverChannels></acquisitionSystemInformation>
 <experimentalConditions><H1resonanceFrequency_Hz>0</H1resonanceFrequency_Hz></experimentalConditions>
 <encoding>
  {space("encodedSpace", encoded)}
  {space("reconSpace", sample.recon)}
  <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{columns - 1}</maximum>\
<center>{columns // 2}</center></kspace_encoding_step_1></encodingLimits>
  <trajectory>cartesian</trajectory>
 </encoding>
</ismrmrdHeader>""".encode()


def _write(path: Path, content: dict[str, np.ndarray | bytes], attrs: dict[str, object]) -> None:
    with atomic_path(path) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                for name, value in content.items():
                    file.create_dataset(name, data=value)
                file.attrs.update(attrs)
        except (OSError, RuntimeError) as error:  # HDF5 raises either, with a text of many lines
            raise OSError("the disk is full or failing") from error
