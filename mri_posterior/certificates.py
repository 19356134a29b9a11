"""What was certified of a prior's uncertainty, and whether a scan lies within it.

A certificate is what `calibration_study` measured on fully sampled data. It speaks of the very prior, sampler and
number of samples, and of masks, noise levels and matrix sizes like those tested: `Certificate.match` says what differs.
Kept as ``certificate.json``, with a page for readers beside it; nothing in it depends on date or machine. Lengths are
in mm, intensities in units of the image's 99th percentile, noise levels in these and per real channel.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from pydantic import TypeAdapter, ValidationError

from mri_posterior.calibration import Estimate
from mri_posterior.config import ReconstructionConfig
from mri_posterior.conformal import scale_interval
from mri_posterior.errors import UserError
from mri_posterior.files import atomic_path
from mri_posterior.masks import mask_family
from mri_posterior.priors import CERTIFICATE, prior_path

__all__ = ["Certificate", "LevelFigures", "Scan", "SettingFigures", "find", "read", "scale_interval", "write"]

FORMAT = 1
SLACK = 0.15
"""How far outside of the tested ranges a scan still counts as inside: a 99th percentile and a mask vary that much."""
Value = str | bool | int | float | None
_STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True)
class LevelFigures:
    """Intervals of one level, on the test subjects' tissue.

    Attributes
    ----------
    coverage: as the sampler gives them.
    factor: that makes them conformal (`conformal.smallest_factor`); None where none was asked for, or none found.
    conformal_coverage: with it.
    width: mean width as given.
    """

    __pydantic_config__ = _STRICT

    level: float
    coverage: Estimate
    width: float
    factor: float | None = None
    conformal_coverage: Estimate | None = None

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or not (self.factor is None or self.factor > 0):
            raise ValueError(f"level {self.level} or factor {self.factor} cannot be")


@dataclass(frozen=True)
class SettingFigures:
    """One way to measure, and how samples fared: of the magnitude, on tissue, of all subjects unless said otherwise.

    Attributes
    ----------
    mask, acceleration, centre: family, all points over the sampled ones, rows and columns of the full centre.
    noise_std: lowest and highest.
    levels: intervals, on the test subjects.
    spread_skill, averaging_gain: see `calibration`; the gain in dB.
    crps: see `metrics.crps`; expected is what it is where the truth is a further draw.
    correlation: of standard deviation and absolute error over pixels; expected with a sample in the truth's place.
    reliability: pixels of each slice sorted by standard deviation into bins of equal count: root mean square of the
        standard deviation, of the posterior error, and of the latter where a sample is in the truth's place.
    width_coverage: coverage at the last level but one, pixels sorted by interval width; expected as before.
    ranks: how often the truth of a region's mean had each rank among the samples, 0 to M, all regions together.
    rank_p_value, tarp_p_value: as if slices were independent, hence too small where they are not; None of too few.
    faults: see `calibration.faults`.
    """

    __pydantic_config__ = _STRICT

    name: str
    mask: str
    acceleration: float
    centre: tuple[int, int]
    noise_std: tuple[float, float]
    levels: tuple[LevelFigures, ...]
    spread_skill: Estimate
    averaging_gain: Estimate
    crps: Estimate
    correlation: Estimate
    reliability: tuple[tuple[float, float, float], ...]
    width_coverage: tuple[Estimate, ...]
    ranks: tuple[int, ...]
    rank_p_value: float | None
    tarp_p_value: float | None
    faults: tuple[str, ...]

    def factor(self, level: float) -> float | None:
        """What makes intervals of `level` conformal; None where that was not certified."""
        figures = self.at(level)
        return figures and figures.factor

    def at(self, level: float) -> LevelFigures | None:
        """The figures of `level`; None where it was not judged."""
        return next((f for f in self.levels if math.isclose(f.level, level)), None)


@dataclass(frozen=True)
class Scan:
    """What a certificate asks of a scan; `voxel_size_mm` and `noise_std` at the resolution that is reconstructed.

    `anatomy` None means that nobody said which.
    """

    mask: Bool[np.ndarray, "H W"]
    noise_std: float
    voxel_size_mm: tuple[float, float] | None = None
    anatomy: str | None = None


@dataclass(frozen=True)
class Certificate:
    """Everything that was certified together.

    Attributes
    ----------
    prior, prior_digest, anatomy: which prior, and what it says that it shows.
    data: what the truths are, in words.
    sampler, warm_start, samples: how each slice was sampled.
    voxel_size_mm, rows, columns: lowest and highest.
    n_subjects, n_slices: of which `n_calibration` and `n_test` subjects made and tested the conformal factors.
    unit, bound, delta: see `conformal.ConformalConfig`; None without factors.
    """

    __pydantic_config__ = _STRICT

    prior: str
    prior_digest: str
    anatomy: str
    data: str
    sampler: dict[str, Value]
    warm_start: str
    samples: int
    voxel_size_mm: tuple[float, float]
    rows: tuple[int, int]
    columns: tuple[int, int]
    n_subjects: int
    n_slices: int
    n_calibration: int
    n_test: int
    unit: Literal["subject", "slice"] | None
    bound: Literal["waudby_smith_ramdas", "hoeffding_bentkus"] | None
    delta: float | None
    settings: tuple[SettingFigures, ...]
    format: Literal[1] = FORMAT

    def match(self, scan: Scan, config: ReconstructionConfig, prior_digest: str) -> tuple[SettingFigures, list[str]]:
        """The setting nearest to a scan, and every way in which the scan lies outside of what was certified."""
        family, acceleration = mask_family(scan.mask), scan.mask.size / np.count_nonzero(scan.mask)
        nearest = min(
            self.settings,
            key=lambda s: (
                s.mask != family,
                round(abs(math.log(s.acceleration / acceleration)) / SLACK),
                _outside(scan.noise_std, s.noise_std),
            ),
        )
        warnings = self._differences(config, prior_digest)
        if family != nearest.mask:
            warnings.append(f"mask is {family}, certified: {nearest.mask}")
        for name, value, known in (
            ("acceleration", acceleration, (nearest.acceleration,) * 2),
            ("noise level", scan.noise_std, nearest.noise_std),
            ("rows", scan.mask.shape[0], self.rows),
            ("columns", scan.mask.shape[1], self.columns),
        ):
            if _outside(value, known) > math.log1p(SLACK):
                warnings.append(f"{name} {value:.3g}, certified: {value_range(known)}")
        for voxel in sorted(set(scan.voxel_size_mm or ())):
            if _outside(voxel, self.voxel_size_mm) > math.log1p(SLACK):
                warnings.append(f"voxels of {voxel:.3g} mm, certified: {value_range(self.voxel_size_mm)} mm")
        if scan.anatomy is not None and scan.anatomy.strip().lower() != self.anatomy.strip().lower():
            warnings.append(f"anatomy {scan.anatomy}, certified: {self.anatomy or 'unknown'}")
        return nearest, warnings

    def _differences(self, config: ReconstructionConfig, prior_digest: str) -> list[str]:
        found = []
        if prior_digest != self.prior_digest:
            found.append(f"another prior: {config.prior.name}, certified: {self.prior} {self.prior_digest[:12]}")
        given = asdict(config.sampler)
        for key in sorted(given.keys() | self.sampler.keys()):
            if given.get(key) != self.sampler.get(key):
                found.append(f"sampler.{key} is {given.get(key)}, certified: {self.sampler.get(key)}")
        if config.warm_start != self.warm_start:
            found.append(f"warm_start is {config.warm_start}, certified: {self.warm_start}")
        if config.std_tolerance is not None:
            found.append(f"the number of samples varies (std_tolerance), certified: {self.samples}")
        elif config.samples != self.samples:
            found.append(f"{config.samples} samples, certified: {self.samples}")
        return found


def _outside(value: float, known: tuple[float, float]) -> float:
    """By which factor, in the log, `value` lies outside of a range; 0 inside."""
    return max(math.log(known[0] / value), math.log(value / known[1]), 0.0)


def value_range(known: tuple[float, float]) -> str:
    """``lowest to highest``, or the one value where they read alike."""
    return " to ".join(dict.fromkeys(f"{value:.3g}" for value in known))


def find(prior_name: str, path: str | Path | None = None) -> Certificate | None:
    """The certificate at `path` (a file, or the folder it lies in), or else the one in the prior's own directory.

    Raises
    ------
    UserError: no certificate at `path`, or one that cannot be read.
    """
    if path is not None:
        return read(Path(path) / CERTIFICATE if Path(path).is_dir() else path)
    beside = prior_path(prior_name) / CERTIFICATE
    return read(beside) if beside.is_file() else None


def read(path: str | Path) -> Certificate:
    """Read what `write` wrote.

    Raises
    ------
    UserError: no such file, or not a certificate of this format, whole and unchanged.
    """
    try:
        tree = json.loads(Path(path).read_text())
        body = json.dumps(tree["certificate"])
        certificate = TypeAdapter(Certificate).validate_json(body, strict=True)
    except OSError as error:
        raise UserError(f"{path}: no certificate can be read ({error.strerror}): run calibrate to make one") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: not a certificate of this version ({where}): run calibrate again") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not a certificate, or a damaged one: run calibrate again") from None
    if tree.keys() != {"certificate", "sha256"} or tree["sha256"] != digest(certificate):
        raise UserError(f"{path}: the certificate was changed since it was written: run calibrate again")
    return certificate


def write(certificate: Certificate, folder: str | Path, page: str) -> Path:
    """``certificate.json`` and, for readers, ``certificate.md``. Returns the path of the former.

    Raises
    ------
    UserError: the folder cannot be written.
    """
    path = Path(folder) / CERTIFICATE
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text(page)
    tree = {"certificate": asdict(certificate), "sha256": digest(certificate)}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n")
    return path


def digest(certificate: Certificate) -> str:
    """SHA-256 of the content, so that a damaged or edited certificate is not taken for a whole one."""
    return hashlib.sha256(json.dumps(asdict(certificate), sort_keys=True).encode()).hexdigest()
