"""Coil sensitivities by sigpy's ESPIRiT, and sigpy's SENSE operator, the reference for `SenseOperator`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Complex

from mri_posterior.errors import UserError

if TYPE_CHECKING:
    import sigpy.linop

MIN_CALIBRATION = 8
"""Fewest fully sampled lines around the centre that ESPIRiT with a 6x6 kernel can work with."""


@dataclass(frozen=True)
class CoilConfig:
    """How coil sensitivities are found.

    Attributes
    ----------
    method: ``espirit`` (Uecker et al. 2014), ``unit`` for one coil (sensitivity 1); ``auto`` chooses
        by the number of coils.
    calib_width: largest calibration region used, in k-space points per side.
    kernel_width, threshold: ESPIRiT's kernel and its cut on calibration-matrix singular values.
    crop: blank maps where ESPIRiT's eigenvalue is below this. 0 keeps them everywhere: the data
        then hold the background at its noise level instead of leaving it to the prior.
    """

    __pydantic_config__ = {"extra": "forbid"}

    method: Literal["auto", "espirit", "unit"] = "auto"
    calib_width: int = 24
    kernel_width: int = 6
    threshold: float = 0.02
    crop: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.kernel_width <= self.calib_width:
            raise UserError(f"coils.kernel_width {self.kernel_width}: it must lie between 2 and coils.calib_width")
        for key in ("threshold", "crop"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"coils.{key} {getattr(self, key)}: it must lie in [0, 1)")


def estimate_maps(
    kspace: Complex[np.ndarray, "coils H W"], calibration: tuple[int, int], config: CoilConfig
) -> Complex[np.ndarray, "coils H W"]:
    """Coil sensitivities with ``sum_c |maps_c|^2 = 1``, complex64.

    Parameters
    ----------
    kspace: pre-whitened, centred, zero where not sampled.
    calibration: rows and columns of the fully sampled centre (`masks.acs_region`).

    Raises
    ------
    UserError: ESPIRiT asked of one coil, ``unit`` of several, or too small a calibration region.
    """
    import sigpy.mri

    n_coils = len(kspace)
    method = config.method if config.method != "auto" else ("espirit" if n_coils > 1 else "unit")
    if method == "unit":
        if n_coils > 1:
            raise UserError(f"coils.method=unit is for one coil, this file has {n_coils}: set coils.method=espirit")
        return np.ones_like(kspace)
    if n_coils == 1:
        raise UserError(
            "coil maps were asked for (coils.method=espirit) but the file has one coil: set coils.method=unit"
        )
    width = min(config.calib_width, *calibration)
    if width < MIN_CALIBRATION:
        raise UserError(
            f"coil maps need {MIN_CALIBRATION} fully sampled lines around the k-space centre, this mask has {width}: "
            "raise mask.center_fraction or use a file with calibration lines"
        )
    app = sigpy.mri.app.EspiritCalib(
        kspace,
        calib_width=width,
        thresh=config.threshold,
        kernel_width=config.kernel_width,
        crop=config.crop,
        show_pbar=False,
    )
    return app.run().astype(np.complex64)


def sense_linop(maps: Complex[np.ndarray, "coils H W"], mask: Bool[np.ndarray, "H W"]) -> sigpy.linop.Linop:
    """The forward operator as sigpy writes it, ``P * F * S``: builds baselines and judges `SenseOperator`."""
    import sigpy.linop

    coils = sigpy.linop.Multiply(maps.shape[1:], maps)
    fourier = sigpy.linop.FFT(maps.shape, axes=(-2, -1))
    sampling = sigpy.linop.Multiply(maps.shape, mask.astype(maps.real.dtype))
    return sampling * fourier * coils
