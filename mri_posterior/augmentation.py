"""Making few magnitude slices stand for many scans: geometry, contrast, resolution, receive field, phase and scale.

Every function takes magnitude images ``[n, H, W]`` and a generator, and treats each image apart.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Complex, Float
from scipy import ndimage
from torch.nn import functional

Images = Float[torch.Tensor, "n H W"]

PHASE_RMS = 0.25  # radians; drawn from an exponential with this mean, so that a few images have much
STRIPPED = 0.15  # fraction of draws without scalp and skull, as brain-extracted volumes are
BIAS_RMS = 0.12  # log receive-field non-uniformity left by coils whose sensitivities were not measured
SCALE_JITTER = 0.2  # log
EMPTY = 0.05  # of the brightness it had: less is a blanked slice, and dividing by it would make an image of noise
SHIFT = 4  # pixels
ROTATION = math.radians(10)
ZOOM = 0.15  # log
RESAMPLED = 0.5  # fraction of draws that are rotated and zoomed; resampling blurs, so the others stay as they are
MAGNIFIED = 0.1  # fraction of draws shown as if their voxels were finer
FINEST = 2.0  # most that these are magnified
RECOLOURED = 0.15  # fraction of draws given another contrast than the data's own
BINS = 6  # of the curve that does so
DEPHASED = 0.4  # fraction of draws whose tissues differ in phase
TISSUE_PHASE_RMS = 0.4  # radians; drawn like PHASE_RMS
PHASE_CALIBRATION = (12, 32)  # fewest and most k-space lines from which the phase is estimated that the maps take up


def percentile(images: Images) -> Float[torch.Tensor, "n 1 1"]:
    """The 99th of the magnitude, as a scan is scaled by at reconstruction."""
    return images.flatten(1).quantile(0.99, dim=1)[:, None, None].clamp_min(1e-12)


def some(n: int, share: float, generator: torch.Generator) -> Bool[torch.Tensor, n]:
    return torch.rand(n, generator=generator) < share


def strip_some(images: Images, generator: torch.Generator) -> Images:
    """Blank a rim of random thickness around the head in a few images: roughly what brain extraction leaves."""
    chosen = some(len(images), STRIPPED, generator)
    rims = 6 + 5 * torch.rand(len(images), generator=generator)
    images = images.clone()
    for i in chosen.nonzero()[:, 0].tolist():
        head = ndimage.binary_fill_holes(ndimage.binary_opening(images[i].numpy() > 0.12))
        depth = torch.from_numpy(ndimage.distance_transform_edt(head)).float()
        images[i] *= (depth - rims[i]).clamp(0, 1)
    return images


def frame(images: Images, crop: tuple[int, int]) -> Images:
    """Pad with air and cut to the centre `crop`."""
    height, width = images.shape[-2:]
    rows, columns = max(crop[0] - height, 0), max(crop[1] - width, 0)
    images = functional.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    top, left = (images.shape[-2] - crop[0]) // 2, (images.shape[-1] - crop[1]) // 2
    return images[:, top : top + crop[0], left : left + crop[1]]


def mirror_some(images: Images, generator: torch.Generator) -> Images:
    return torch.where(some(len(images), 0.5, generator)[:, None, None], images.flip(-1), images)


def window(images: Images, crop: tuple[int, int], generator: torch.Generator) -> Images:
    """A window of `crop` anywhere in each image, real or complex, with air around it where the image is smaller."""
    images = frame(images, (max(crop[0], images.shape[-2]), max(crop[1], images.shape[-1])))
    places = (
        torch.randint(have - want + 1, (len(images),), generator=generator).tolist()
        for have, want in zip(images.shape[-2:], crop, strict=True)
    )
    return torch.stack([im[r : r + crop[0], c : c + crop[1]] for im, r, c in zip(images, *places, strict=True)])


def move(images: Images, generator: torch.Generator) -> Images:
    """Shift by whole pixels; rotate and zoom half of the images; magnify a few, anywhere in them, up to `FINEST`."""
    n = len(images)
    shifts = torch.randint(-SHIFT, SHIFT + 1, (n, 2), generator=generator).tolist()
    shifted = torch.stack([torch.roll(im, tuple(s), dims=(0, 1)) for im, s in zip(images, shifts, strict=True)])
    angle = ROTATION * (2 * torch.rand(n, generator=generator) - 1)
    log_zoom = ZOOM * (2 * torch.rand(n, generator=generator) - 1)
    magnified = some(n, MAGNIFIED, generator)
    log_zoom = torch.where(magnified, -math.log(FINEST) * torch.rand(n, generator=generator), log_zoom)
    zoom = log_zoom.exp()
    aspect = images.shape[-2] / images.shape[-1]
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = zoom * angle.cos(), -zoom * angle.sin() * aspect
    theta[:, 1, 0], theta[:, 1, 1] = zoom * angle.sin() / aspect, zoom * angle.cos()
    # What is magnified is looked at anywhere inside of the image.
    theta[:, :, 2] = (1 - zoom).clamp_min(0)[:, None] * (2 * torch.rand(n, 2, generator=generator) - 1)
    grid = functional.affine_grid(theta, [n, 1, *images.shape[-2:]], align_corners=False)
    resampled = functional.grid_sample(shifted[:, None], grid, mode="bicubic", align_corners=False)[:, 0].clamp_min(0)
    chosen = some(n, RESAMPLED, generator) | magnified
    return torch.where(chosen[:, None, None], resampled, shifted)


def recolour(images: Images, generator: torch.Generator) -> Images:
    """Vary the contrast: gamma in half of the images, another tissue contrast in a few, a smooth receive field in all.

    The other contrast is a random curve of the intensity, not monotone: what T2 and FLAIR are to T1, whose order of
    fluid, grey and white matter they turn round. Air stays dark.
    """
    n = len(images)
    gamma = torch.exp(0.25 * torch.randn(n, generator=generator) * some(n, 0.5, generator))
    images = images.clamp_min(0) ** gamma[:, None, None]
    knots = torch.rand(n, BINS, generator=generator)
    knots[:, 0] = 0
    images = torch.where(some(n, RECOLOURED, generator)[:, None, None], curve_of(images, knots), images)
    images = images * torch.exp(BIAS_RMS * smooth_field(images.shape, generator))
    return images / percentile(images).clamp_min(EMPTY)


def curve_of(images: Images, knots: Float[torch.Tensor, "n bins"]) -> Images:
    """The piecewise linear function of each image's intensity through its `knots`, spread evenly from 0 to a little
    over the 99th percentile."""
    bins = knots.shape[1]
    position = (images / percentile(images).clamp_min(EMPTY) * (bins - 2)).clamp(0, bins - 1 - 1e-4)
    lower = position.long()
    flat = lower.flatten(1)
    left, right = (knots.gather(1, flat + i).reshape(images.shape) for i in (0, 1))
    return left + (position - lower) * (right - left)


def dephase_some(images: Images, generator: torch.Generator) -> Complex[torch.Tensor, "n H W"]:
    """Give the tissues of some images a phase of their own, a random curve of their intensity: fat off resonance,
    flow, susceptibility. What a low-resolution estimate knows of it goes into the coil maps (`measurement`), so only
    the rest stays: sharp, at the borders of tissues, above all of the scalp."""
    n, height, width = images.shape
    curve = curve_of(images, 2 * torch.rand(n, BINS, generator=generator) - 1)
    strength = _exponential(n, TISSUE_PHASE_RMS, generator) * some(n, DEPHASED, generator)[:, None, None]
    complex_images = torch.polar(images.float(), strength * curve)
    lines = torch.randint(PHASE_CALIBRATION[0], PHASE_CALIBRATION[1] + 1, (n, 1), generator=generator)
    hann = [
        torch.cos(math.pi * (torch.fft.fftfreq(size, 1 / size) / (lines + 1)).clamp(-0.5, 0.5)) ** 2
        for size in (height, width)
    ]
    low_resolution = torch.fft.ifft2(torch.fft.fft2(complex_images) * hann[0][:, :, None] * hann[1][:, None, :])
    return complex_images * torch.exp(-1j * low_resolution.angle())


def scan(
    images: Images | Complex[torch.Tensor, "n H W"], generator: torch.Generator, *, jitter: bool
) -> Complex[torch.Tensor, "n H W"]:
    """The images with a smooth phase (more of it), as errors of the phase that went into the coil maps leave.

    With `jitter`, the scale varies, as a scan's own 99th percentile does when estimated from noisy data.
    """
    n = len(images)
    if jitter:
        images = images * torch.exp(SCALE_JITTER * torch.randn(n, 1, 1, generator=generator))
    phase = _exponential(n, PHASE_RMS, generator) * smooth_field(images.shape, generator)
    return images * torch.polar(torch.ones_like(phase), phase)


def _exponential(n: int, mean: float, generator: torch.Generator) -> Float[torch.Tensor, "n 1 1"]:
    return -mean * torch.rand(n, 1, 1, generator=generator).clamp_min(1e-6).log()


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
