"""`MultiCoilSlice`: what one slice's measurement is, once everything the file format knows has been used up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex


@dataclass(frozen=True)
class MultiCoilSlice:
    """One undersampled slice, ready for inference: whitened, scaled, with its coil maps.

    The image model is ``kspace = mask * F(maps * x) + noise_std * n``, with ``F`` the centred orthonormal
    FFT, ``n`` complex white noise of level 1 per real channel, and ``|x|`` of order 1.

    Attributes
    ----------
    kspace: pre-whitened across coils, divided by `scale`; zero where not sampled.
    mask: sampled points.
    maps: coil sensitivities, ``sum_c |maps_c|^2 = 1``; the image's low-resolution phase has been moved into them.
    noise_std: per real channel, in the units of `kspace`.
    scale, weight: ``x * scale * weight`` is the image in the file's units, comparable to a root-sum-of-squares
        reference, and with the phase of the maps as estimated. `weight` varies over the image because
        whitening weighs the coils.
    """

    kspace: Complex[torch.Tensor, "coils H W"]
    mask: Bool[torch.Tensor, "H W"]
    maps: Complex[torch.Tensor, "coils H W"]
    noise_std: float
    scale: float
    weight: Complex[torch.Tensor, "H W"]
