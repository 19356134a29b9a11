"""fastMRI-style HDF5 in and out: k-space volumes as the data sets ship them, reconstructions as we write them.

Nothing is guessed or swallowed: a file that is not what it should be is a `UserError` that names it. Only the slice
that is asked for is read. Images and k-space are ``[H, W]`` with H along the readout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import h5py
import numpy as np
from jaxtyping import Bool, Complex64, Float32

from mri_posterior.errors import UserError
from mri_posterior.files import atomic_path, require_free_space

TARGETS = ("reconstruction_rss", "reconstruction_esc")
_MAPS = ("mean", "std", "lower", "upper")
_HEADER = {
    "encoded": ("encodedSpace/matrixSize", "x", "y", int),
    "recon": ("reconSpace/matrixSize", "x", "y", int),
    "fov": ("reconSpace/fieldOfView_mm", "x", "y", float),
    "columns": ("encodingLimits/kspace_encoding_step_1", "center", "maximum", int),
}


@dataclass(frozen=True, eq=False)
class Volume:
    """What one file holds, known without having read its k-space.

    Attributes
    ----------
    shape: of k-space, (H, W).
    recon_shape: (H, W) of the centre crop that fastMRI compares, never larger than the k-space or the target.
    encoded_shape: (H, W) of the encoded matrix in the header; `shape` without a header.
    acquired_columns: (start, stop) of the k-space columns that the scanner encoded; the others are padding, not data.
    voxel_size_mm: (row, column) spacing of the reconstruction; None if the header gives no field of view.
    mask: the file's own sampled points; None in a file without one, as in fastMRI's training files.
    target: name of the reference reconstruction in the file, if any.
    attrs: the file's attributes as plain Python values.
    """

    path: Path
    name: str
    n_slices: int
    n_coils: int
    shape: tuple[int, int]
    recon_shape: tuple[int, int]
    encoded_shape: tuple[int, int]
    acquired_columns: tuple[int, int]
    voxel_size_mm: tuple[float, float] | None
    mask: Bool[np.ndarray, "H W"] | None
    target: str | None
    attrs: dict[str, Any]

    @property
    def readout_oversampled(self) -> bool:
        """Whether more rows were encoded than are kept (scanners oversample the readout by two)."""
        return self.encoded_shape[0] > self.recon_shape[0]


@dataclass(frozen=True, eq=False)
class VolumeReconstruction:
    """One volume's result, cropped as fastMRI crops and in the units of the input.

    `reconstruction` is the magnitude of the complex posterior `mean`; `std`, `lower` and `upper` are of the magnitude,
    and the interval holds `level` of the posterior. `slices` are their indices in the volume. `samples`, when kept, are
    the first draws, as many as every slice has; maps use all ``attrs["n_samples"]``. `diagnostics` are maps by name
    (`diagnostics.SliceDiagnostics`). `attrs` say how it was made; sequences in them return from a file as lists.
    """

    reconstruction: Float32[np.ndarray, "slice h w"]
    mean: Complex64[np.ndarray, "slice h w"]
    std: Float32[np.ndarray, "slice h w"]
    lower: Float32[np.ndarray, "slice h w"]
    upper: Float32[np.ndarray, "slice h w"]
    samples: Complex64[np.ndarray, "slice sample h w"] | None
    level: float
    slices: list[int]
    attrs: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Float32[np.ndarray, "slice h w"]] = field(default_factory=dict)


def list_volumes(path: str | Path) -> list[Path]:
    """The files that ``--input`` means: the file itself, or every ``*.h5`` of a folder, sorted; others are ignored.

    Raises `UserError` if the path does not exist or the folder holds no ``*.h5``.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: check --input")
    # Hidden files are half-written volumes and what macOS leaves beside real ones.
    found = sorted(entry for entry in path.glob("*.h5") if entry.name[0] != ".") if path.is_dir() else [path]
    if not found:
        raise UserError(f"{path}: the folder holds no .h5 files: give --input a fastMRI volume or a folder of them")
    return found


def open_volume(path: str | Path) -> Volume:
    """Learn what a fastMRI file holds, and that it is usable, without reading its k-space.

    ``kspace`` is ``[slice, coil, H, W]``, or ``[slice, H, W]`` for a single coil, complex and centred. Raises
    `UserError` if the file is missing, a folder, not HDF5 or incomplete, or its k-space, mask, target or header is bad.
    """
    path = Path(path)
    with _opened(path) as file:
        kspace = _dataset(file, path, "kspace")
        if kspace.ndim not in (3, 4) or 0 in kspace.shape:
            raise UserError(f"{path}: kspace is {list(kspace.shape)}: it must be [slice, coil, H, W] or [slice, H, W]")
        if kspace.dtype.kind != "c":
            raise UserError(f"{path}: kspace is {kspace.dtype}, not complex: store it as complex64")
        n_slices, shape = kspace.shape[0], kspace.shape[-2:]
        target = next((name for name in (TARGETS if kspace.ndim == 4 else TARGETS[::-1]) if name in file), None)
        reference = None if target is None else _dataset(file, path, target)
        if reference is not None and (
            reference.ndim != 3 or len(reference) != n_slices or not reference.size or reference.dtype.kind not in "fiu"
        ):
            raise UserError(
                f"{path}: {target} is {reference.dtype} {list(reference.shape)}: it must be real [{n_slices}, h, w]"
            )
        return Volume(
            path=path,
            name=path.stem,
            n_slices=n_slices,
            n_coils=kspace.shape[1] if kspace.ndim == 4 else 1,
            shape=shape,
            mask=_read_mask(file, path, shape),
            target=target,
            attrs=_plain(file.attrs),
            **_geometry(_read_header(file, path), shape, None if reference is None else reference.shape[1:]),
        )


def read_kspace(volume: Volume, index: int) -> Complex64[np.ndarray, "coils H W"]:
    """K-space of one slice, in the file's units; a single-coil file has one coil.

    Raises `UserError` if there is no such slice or it is damaged, not finite, or zero throughout.
    """
    kspace = _read_slice(volume, "kspace", index).astype(np.complex64).reshape(volume.n_coils, *volume.shape)
    if not kspace.any():
        raise UserError(f"{volume.path}: kspace of slice {index} is zero throughout: leave that slice out")
    return kspace


def read_target(volume: Volume, index: int) -> Float32[np.ndarray, "h w"] | None:
    """The file's reference image of one slice, its centre cropped to ``volume.recon_shape``; None if it has none.

    Raises `UserError` if there is no such slice or it is damaged or not finite.
    """
    if volume.target is None:
        return None
    target = _read_slice(volume, volume.target, index).astype(np.float32)
    top, left = ((have - keep) // 2 for have, keep in zip(target.shape, volume.recon_shape, strict=True))
    return target[top : top + volume.recon_shape[0], left : left + volume.recon_shape[1]]


def write_reconstruction(path: str | Path, result: VolumeReconstruction) -> None:
    """Write one volume's result as fastMRI's evaluation reads it, whole or not at all.

    ``reconstruction`` lies at the root, ``mean``, ``std``, ``lower``, ``upper`` and, when kept, ``samples`` in the
    group ``posterior``, with attributes ``level`` and ``slices``, maps in ``diagnostics``, `result.attrs` at the root.
    Raises `UserError` if the disk is too full or the folder cannot be written.
    """
    path = Path(path)
    names = _MAPS if result.samples is None else (*_MAPS, "samples")
    arrays = {"reconstruction": result.reconstruction} | {f"posterior/{name}": getattr(result, name) for name in names}
    arrays |= {f"diagnostics/{name}": image for name, image in result.diagnostics.items()}
    require_free_space(path.parent, sum(array.nbytes for array in arrays.values()) + 2**20)
    with atomic_path(path) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                for name, array in arrays.items():  # contiguous: HDF5 can crash closing chunked data on a full disk
                    file.create_dataset(name, data=array)
                file["posterior"].attrs.update(level=result.level, slices=result.slices)
                file.attrs.update(result.attrs)
        except (OSError, RuntimeError) as error:  # HDF5 raises either, with a text of many lines
            raise OSError("the disk is full or failing") from error


def read_reconstruction(path: str | Path) -> VolumeReconstruction:
    """Read back what `write_reconstruction` wrote.

    Raises `UserError` if the file is missing, incomplete, or not one of our reconstructions.
    """
    path = Path(path)
    with _opened(path) as file:
        names = (*_MAPS, "samples") if "posterior/samples" in file else _MAPS
        arrays = {name: _dataset(file, path, f"posterior/{name}")[()] for name in names}
        arrays["reconstruction"] = _dataset(file, path, "reconstruction")[()]
        diagnostics = {name: _dataset(file, path, f"diagnostics/{name}")[()] for name in file.get("diagnostics", ())}
        posterior, attrs = _plain(file["posterior"].attrs), _plain(file.attrs)
    level, slices = posterior.get("level"), posterior.get("slices")
    # Every array but the samples has the same axes; theirs has one more, after the slices.
    shapes = {a.shape[:1] + a.shape[2:] if name == "samples" else a.shape for name, a in (diagnostics | arrays).items()}
    shape = arrays["reconstruction"].shape
    if shapes != {shape} or len(shape) != 3 or level is None or slices is None or len(slices) != shape[0]:
        raise UserError(f"{path}: its arrays, slices or level do not fit together: reconstruct the volume again")
    parts = {"samples": None, "diagnostics": diagnostics} | arrays
    return VolumeReconstruction(**parts, level=level, slices=slices, attrs=attrs)


def _read_header(file: h5py.File, path: Path) -> dict[str, Any]:
    """The pairs of numbers named in `_HEADER`; None where the file does not say."""
    pairs: dict[str, Any] = dict.fromkeys(_HEADER)
    if "ismrmrd_header" not in file:
        return pairs
    try:
        text = np.asarray(_dataset(file, path, "ismrmrd_header")[()]).astype(bytes).item().decode()
        # Entities are how XML reads other files or grows without bound; decoded text has no encoding to hide one in.
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise ValueError("it declares a DOCTYPE")
        root = ElementTree.fromstring(text)  # noqa: S314
        for name, (where, *tags, kind) in _HEADER.items():
            steps = [f"{{*}}{step}" for step in ("encoding", *where.split("/"))]
            found = [root.findtext("/".join([*steps, f"{{*}}{tag}"])) for tag in tags]
            pairs[name] = None if None in found else tuple(map(kind, found))
        if any(pairs[name] is not None and min(pairs[name]) < 1 for name in ("encoded", "recon")):
            raise ValueError("a matrix size is below 1")
    except (ElementTree.ParseError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: ismrmrd_header is malformed ({error}): mend it or delete the dataset") from None
    return pairs


def _geometry(header: dict[str, Any], shape: tuple[int, int], target: tuple[int, int] | None) -> dict[str, Any]:
    """The fields of `Volume` that follow from the header and the shapes of k-space and target."""
    rows, columns = header["recon"] or target or shape
    if shape[1] < columns:
        # fastMRI's own exception for brain volumes narrower than their header's crop: a square of k-space's width.
        rows = columns = shape[1]
    voxel_size, start, stop = None, 0, shape[1]
    if header["recon"] and header["fov"] and all(0 < length < 1e4 for length in header["fov"]):
        voxel_size = (header["fov"][0] / header["recon"][0], header["fov"][1] / header["recon"][1])
    if header["columns"] and header["encoded"] and header["encoded"][1] == shape[1]:
        centre, maximum = header["columns"]
        start = max(shape[1] // 2 - centre, 0)
        stop = min(shape[1] // 2 - centre + maximum + 1, shape[1])
    return {
        "recon_shape": tuple(map(min, (rows, columns), shape, target or shape)),
        "encoded_shape": header["encoded"] or shape,
        "acquired_columns": (start, stop) if start < stop else (0, shape[1]),
        "voxel_size_mm": voxel_size,
    }


def _read_mask(file: h5py.File, path: Path, shape: tuple[int, int]) -> Bool[np.ndarray, "H W"] | None:
    names = [name for name in ("mask", "mask2d") if name in file]
    if not names:
        return None
    if len(names) == 2:
        raise UserError(f"{path}: holds both mask and mask2d: keep the one that is meant")
    mask = _dataset(file, path, names[0])
    if mask.shape not in (shape[1:], shape):
        raise UserError(f"{path}: {names[0]} is {list(mask.shape)}: it must be [{shape[1]}] or {list(shape)}")
    values = mask[()]
    if values.dtype.kind not in "biufc" or not np.isin(values, (0, 1)).all() or not values.any():
        raise UserError(f"{path}: {names[0]} must hold 1 where k-space was sampled and 0 elsewhere: store it so")
    return np.broadcast_to(values != 0, shape).copy()


def _read_slice(volume: Volume, name: str, index: int) -> np.ndarray:
    if not 0 <= index < volume.n_slices:
        raise UserError(f"{volume.path}: there is no slice {index}: the volume has slices 0 to {volume.n_slices - 1}")
    with _opened(volume.path) as file:
        values = _dataset(file, volume.path, name)[index]
    if not np.isfinite(values).all():
        raise UserError(f"{volume.path}: {name} of slice {index} holds NaN or infinity: leave that slice out")
    return values


def _dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    item = file.get(name)
    if not isinstance(item, h5py.Dataset):
        raise UserError(f"{path}: has no dataset '{name}' (it holds {list(file)}): is it the right file?")
    return item


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The file, open for reading; whatever goes wrong while it is read is told as the user's to mend."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give an .h5 file that exists") from None
    if not h5py.is_hdf5(path):
        raise UserError(f"{path}: is not an HDF5 file: give a fastMRI .h5 volume")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:  # h5py's ways to meet damaged metadata
        raise UserError(f"{path}: is damaged or incomplete: copy or download it again") from error


def _plain(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """HDF5 attributes as plain Python values; an empty one is None."""
    plain = {k: v if isinstance(v, str) else v.tolist() if hasattr(v, "tolist") else None for k, v in attrs.items()}
    return {k: v.decode(errors="replace") if isinstance(v, bytes) else v for k, v in plain.items()}
