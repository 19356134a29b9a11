"""Images for a page that a browser reads without a network: exact numbers in few bytes, colours, still pictures.

Numbers are stored as whole multiples of one step, deflated, in base64: a browser inflates such bytes exactly, which it
does not promise for the pixels of a PNG (colour management, privacy modes that disturb readback).
"""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8, UInt16

from mri_posterior.metrics import foreground_mask

Stack = Float[np.ndarray, "slice h w"]
Codes = UInt16[np.ndarray, "slice h w"]

_BUDGET = 13_500_000  # characters of image data; with all else the page stays below 15 MB
_STEPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # in median standard deviations: the finest that the budget allows
_STD_FINER = 4  # a standard deviation is small beside its image, so it is stored in finer steps
_ALWAYS, _ENOUGH = 2, 4  # samples: below the first there is no flicker, the second is worth coarser steps
_MISSING = 65535  # the code of a value that is not finite
_CUT = 0.999  # quantile beyond which the page says "at least": the diagnostics have long tails
_CUT_CODE = 100


def window_top(stack: Stack) -> float:
    """Upper end of a window that starts at 0; blank images get 1, so that they still draw."""
    return float(np.percentile(stack, 99.5)) or 1.0


def window_range(stack: Stack, quantile: float = 0.995) -> list[float]:
    """A window from the smallest finite value to a quantile, never empty."""
    finite = stack[np.isfinite(stack)]
    low, high = (float(finite.min()), float(np.quantile(finite, quantile))) if finite.size else (0.0, 1.0)
    return [low, high if high > low else low + 1]


def encode(stacks: dict[str, Stack], maps: dict[str, Stack]) -> dict[str, dict[str, Any]]:
    """The arrays of a page by name: ``value = offset + step * code``, codes of each slice as `_pack` writes them.

    Noise does not compress below its entropy, about ``log2(4.1 / step)`` bits per pixel for a step in its standard
    deviations. So the step of all images is a share of the typical posterior standard deviation, coarser where the
    budget demands it; where even the coarsest is too much, samples and then diagnostic maps are left out. (A very large
    volume can still exceed the budget: the images themselves and two samples are never left out.)

    Parameters
    ----------
    stacks: magnitudes, among them ``mean`` and ``std``; samples are called ``sample_1``, ``sample_2``, …
    maps: chain diagnostics, of any unit; values beyond their 99.9th percentile are stored as ``top``.
    """
    mean, std = stacks["mean"], stacks["std"]
    typical = float(np.median(std[foreground_mask(mean)])) if mean.max() > 0 else 0.0
    finest = (max(float(np.nanmax(stack)) for stack in stacks.values()) or 1.0) / (_MISSING - 1)
    samples = [name for name in stacks if name.startswith("sample_")]
    optional = [*samples[:_ALWAYS], *maps, *samples[_ALWAYS:]]
    enough = {*samples[:_ENOUGH], *maps}
    middle = slice(len(mean) // 2, len(mean) // 2 + 1)  # it shows the most of an object, so it stands for all
    for share in _STEPS:
        step = max(share * typical, finest)
        trial = _arrays({n: s[middle] for n, s in stacks.items()}, {n: m[middle] for n, m in maps.items()}, step)
        cost = {name: len(mean) * len(array["data"][0]) for name, array in trial.items()}
        room = _BUDGET - sum(cost[name] for name in stacks if name not in samples)
        total = np.cumsum([cost[name] for name in optional])
        kept = {*samples[:_ALWAYS], *(name for name, size in zip(optional, total, strict=True) if size <= room)}
        if enough <= kept:
            break
    images = {name: stack for name, stack in stacks.items() if name not in samples or name in kept}
    return _arrays(images, {name: stack for name, stack in maps.items() if name in kept}, step)


def _arrays(stacks: dict[str, Stack], maps: dict[str, Stack], step: float) -> dict[str, dict[str, Any]]:
    mean, arrays = _codes(stacks["mean"], 0, step), {}
    for name, stack in stacks.items():
        if name == "std":
            arrays[name] = _array(_codes(stack, 0, step / _STD_FINER), None, 0, step / _STD_FINER)
        else:
            arrays[name] = _array(_codes(stack, 0, step), None if name == "mean" else mean, 0, step)
    for name, stack in maps.items():
        low, high = window_range(stack, _CUT)
        coarse = (high - low) / _CUT_CODE
        codes = _codes(stack, low, coarse)
        codes = np.where(codes == _MISSING, codes, np.minimum(codes, _CUT_CODE))
        arrays[name] = _array(codes, None, low, coarse) | {"top": high}
    return arrays


def _array(codes: Codes, mean: Codes | None, offset: float, step: float) -> dict[str, Any]:
    data = [_pack(image, None if mean is None else mean[k]) for k, image in enumerate(codes)]
    return {"offset": offset, "step": step, "data": data}


def _codes(stack: Stack, offset: float, step: float) -> Codes:
    finite = np.isfinite(stack)
    codes = np.clip(np.rint((np.where(finite, stack, offset) - offset) / step), 0, _MISSING - 1)
    return np.where(finite, codes, _MISSING).astype(np.uint16)


def _pack(codes: UInt16[np.ndarray, "h w"], mean: UInt16[np.ndarray, "h w"] | None) -> str:
    """The shortest of three forms, each a byte that says which, all low bytes, all high bytes; deflated, in base64.

    0: the codes; 1: differences along each row, from 0; 2: differences from the mean's codes. Differences are modulo
    2^16 and written 0, -1, 1, -2, … as 0, 1, 2, 3, …: smooth images are shortest as 1, samples as 2, noise as 0.
    """
    forms = [codes, _zigzag(np.diff(codes, axis=1, prepend=np.uint16(0)))]
    if mean is not None:
        forms.append(_zigzag(codes - mean))
    packed = [
        _deflate(bytes([k]) + (form & 255).astype(np.uint8).tobytes() + (form >> 8).astype(np.uint8).tobytes())
        for k, form in enumerate(forms)
    ]
    return base64.b64encode(min(packed, key=len)).decode()


def _deflate(data: bytes) -> bytes:
    """For noise with blank stretches: looking for other repetitions takes five times as long and gains nothing."""
    compressor = zlib.compressobj(memLevel=9, strategy=zlib.Z_RLE)
    return compressor.compress(data) + compressor.flush()


def _zigzag(differences: UInt16[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
    signed = differences.view(np.int16)
    return ((signed << 1) ^ (signed >> 15)).view(np.uint16)


def palettes() -> dict[str, UInt8[np.ndarray, "257 4"]]:
    """256 opaque colours and one for missing values; all can be told apart with any colour vision.

    The signed one is dark in the middle, where the image agrees, and goes from there to blue and to orange.
    """
    import matplotlib  # a second that a reader of the module need not pay

    signed = np.array([[150, 220, 255], [30, 110, 220], [12, 12, 16], [225, 105, 15], [255, 225, 140]]) / 255
    position = np.linspace(0, 4, 256)
    colours = {name: matplotlib.colormaps[name](np.arange(256))[:, :3] for name in ("gray", "viridis", "cividis")}
    colours["signed"] = np.stack([np.interp(position, range(5), channel) for channel in signed.T], axis=1)
    names = {"gray": "grey", "viridis": "uncertainty", "cividis": "diagnostic", "signed": "signed"}
    missing = np.full((1, 3), 0.24)
    return {
        names[name]: np.rint(255 * np.insert(np.concatenate([table, missing]), 3, 1, axis=1)).astype(np.uint8)
        for name, table in colours.items()
    }


def still_picture(
    image: Float[np.ndarray, "h w"], window: tuple[float, float], palette: UInt8[np.ndarray, "257 4"]
) -> str:
    """An image as the address (``data:``) of a PNG, for print and for readers without scripts."""
    from PIL import Image

    low, high = window
    picture = Image.fromarray(np.rint(255 * np.clip((image - low) / (high - low), 0, 1)).astype(np.uint8))
    picture.putpalette(palette[:256, :3].tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
