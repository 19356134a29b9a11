"""How far apart are two sets of complex images as distributions?

A distance between two finite sets is never zero: judge it against `monte_carlo_floor`, the distances between sets of
the same sizes that do come from one distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Complex, Float

Images = Complex[torch.Tensor, "n H W"]


def sliced_wasserstein(a: Images, b: Images, generator: torch.Generator, projections: int = 256) -> float:
    """Sliced 2-Wasserstein distance (Rabin et al. 2011; Bonneel et al. 2015), in the images' units.

    The root mean square, over random directions, of the 1-D Wasserstein distance of the projected sets. Directions are
    of unit length in the ``2 H W`` real dimensions, so distances are *per real channel*: white noise of levels s and t
    is ``|s - t|`` apart. The sets may differ in size.

    Parameters
    ----------
    generator: draws the directions; on the images' device.

    Raises
    ------
    ValueError: images of different shapes, or an empty set.
    """
    if a.shape[1:] != b.shape[1:] or not len(a) or not len(b):
        raise ValueError(f"sets {tuple(a.shape)} and {tuple(b.shape)}: expected two non-empty sets of one image shape")
    a, b = (torch.view_as_real(x.to(torch.complex128)).flatten(1) for x in (a, b))
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=a.dtype, device=a.device)
    directions = directions / directions.square().sum(0).sqrt()
    a, b = (a @ directions).sort(dim=0).values, (b @ directions).sort(dim=0).values
    # Both quantile functions are constant between multiples of 1/n and 1/m: in units of 1/(n m) all cuts are whole.
    n, m = len(a), len(b)
    own, other = torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n
    cuts = torch.cat([own, other]).unique()
    widths = torch.diff(cuts, prepend=torch.zeros(1, dtype=cuts.dtype)).to(a) / (n * m)
    squared = widths @ (a[(cuts - 1) // m] - b[(cuts - 1) // n]).square()
    return math.sqrt(float(squared.mean()))


def monte_carlo_floor(
    distance: Callable[[Images, Images], float],
    draw: Callable[[int, torch.Generator], Images],
    sizes: tuple[int, int],
    generator: torch.Generator,
    repeats: int = 20,
) -> Float[torch.Tensor, " repeats"]:
    """Distances between two sets of `sizes` of the *same* distribution: what is no more than chance.

    Parameters
    ----------
    distance: between two sets; see `sliced_wasserstein` and `frechet_distance`.
    draw: ``draw(n, generator)`` gives n exact samples, such as a method `exact_samples` in `mri_posterior.exact`.

    Under the hypothesis that a sampler is right its distance to an exact set exceeds the largest of `repeats` such
    distances with probability ``1/(repeats + 1)``.
    """
    first, second = sizes
    return torch.tensor([distance(draw(first, generator), draw(second, generator)) for _ in range(repeats)])


def frechet_distance(a: Float[torch.Tensor, "n k"], b: Float[torch.Tensor, "m k"]) -> float:
    """Squared 2-Wasserstein distance of the normal laws with the two sets' means and covariances (Dowson and Landau
    1982): ``|m_a - m_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2))``, in squared units of the features.

    By eigenvalues of the symmetric form, so covariances may be singular (fewer images than features). With few images
    the distance is biased upwards: compare sets of one size.

    Raises
    ------
    ValueError: features of different number, or fewer than 2 images.
    """
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features {tuple(a.shape)} and {tuple(b.shape)}: expected [n, k] and [m, k], n and m above 1")
    a, b = a.double(), b.double()
    covariance_a, covariance_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    eigenvalues, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * eigenvalues.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    # Rounding can take equal sets a hair below zero.
    return max(0.0, float(shift + covariance_a.trace() + covariance_b.trace() - 2 * cross))


def gabor_features(
    images: Images, scales: int = 3, orientations: int = 8, cells: int = 2
) -> Float[torch.Tensor, "n k"]:
    """Fixed texture features: mean magnitudes of log-Gabor responses (Field 1987), with no weights to download.

    Band-pass filters an octave wide at radial frequencies 1/4, 1/8, … cycles per pixel and evenly spaced directions,
    all around, since a complex image has no symmetric spectrum. Each response's magnitude is averaged over
    ``cells x cells`` equal parts of the image (rows and columns left over are dropped): ``k = scales * orientations *
    cells^2``, in the images' units. Invariant to the global phase.

    Raises
    ------
    ValueError: an image smaller than the wavelength of the coarsest filter, or than the cells.
    """
    height, width = images.shape[-2:]
    if min(height, width) < max(2 ** (scales + 1), cells):
        raise ValueError(f"images {height} x {width}: {scales} scales need at least {2 ** (scales + 1)} pixels a side")
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64, device=images.device) for n in (height, width))
    radius = torch.hypot(rows[:, None], columns[None])
    angle = torch.atan2(rows[:, None], columns[None])
    # Half an octave to either side of the centre and half a spacing of directions are one standard deviation.
    log_radius = radius.clamp_min(1e-12).log2()
    radial = torch.stack([torch.exp(-2 * (log_radius + 2 + scale) ** 2) for scale in range(scales)])
    spacing = 2 * math.pi / orientations
    centres = spacing * torch.arange(orientations, device=images.device)[:, None, None]
    turned = torch.remainder(angle - centres + math.pi, 2 * math.pi) - math.pi
    filters = (radial[:, None] * torch.exp(-2 * (turned / spacing) ** 2)).flatten(0, 1)
    spectrum = torch.fft.fft2(images.to(torch.complex128))
    part = height // cells, width // cells
    features = []
    for gain in filters:  # one at a time: all responses of many images at once would not fit into memory
        response = torch.fft.ifft2(spectrum * gain).abs()[:, : part[0] * cells, : part[1] * cells]
        features.append(response.unflatten(2, (cells, part[1])).unflatten(1, (cells, part[0])).mean((2, 4)).flatten(1))
    return torch.cat(features, dim=1)
