"""How wrong is a denoiser's score? The guarantees of posterior sampling rest on it, in the fourth moment.

**Unit.** The error of an image is ``e = sigma |s_hat - s| / sqrt(2 H W)``, the root mean square over its real channels
of `sigma` times the error of the score; by Tweedie's formula ``e = |D - D*| / (sigma sqrt(2 H W))``, where ``D*`` is
``E[x_0 | x]``. It has no dimension: the score of the noise alone, ``-n/sigma``, has 1. Moments and quantiles are over
images and noise; the theorem's ``E|s_hat - s|^4`` is ``E e^4 (2 H W)^2 / sigma^4``.

**What can be known.** Where ``D*`` is known in closed form, everything (`score_error`). With clean images alone:

- *Differences* between two denoisers, exactly, since ``E|D - x_0|^2 = E|D - D*|^2 + E|D* - x_0|^2`` and the last term
  is the same for both (`difference`).
- *Bounds from above*: ``D - D* = E[D - x_0 | x]``, so by Jensen's inequality every increasing convex function of the
  score error has an expectation no larger than that of the denoising error. This holds for the second and fourth
  moment and for the mean of the worst share of images. It does not hold for quantiles; but a quantile is no larger than
  the mean of what lies beyond it, so those means bound the quantiles too. No bound can be tight: most of the
  denoising error is what no denoiser can know.
- *A bound from below*: any function ``f(x)`` of the noisy image obeys
  ``E|D - x_0|^2 - E|D + f - x_0|^2 = E|D - D*|^2 - E|D + f - D*|^2 <= E|D - D*|^2``: what a correction gains on images
  that it was not fitted to was the denoiser's own error (`bounds`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Complex, Float

from mri_posterior.noise import NoiseStreams, stable_seed
from mri_posterior.priors import Prior

SHARES = (0.5, 0.9, 0.99, 0.999)
BAND_EDGES = (0.0, 0.125, 0.25, 0.5, 2.0)
"""Of radial frequency, in units of the highest along an axis."""

Images = Complex[torch.Tensor, "n H W"]


@dataclass(frozen=True)
class ErrorSummary:
    """Errors of `images` images, in the module's unit.

    Attributes
    ----------
    mean_square, standard_error: ``E e^2``, and the standard error of its estimate were the images independent: slices
        of one subject are not quite, so it is then somewhat larger.
    mean_fourth: ``E e^4``.
    quantiles, tail_means: by share, such as ``"0.99"``: the error that 99 % of the images stay below, and the mean of
        the rest. None where fewer than one image is left for the rest.
    """

    images: int
    mean_square: float
    standard_error: float
    mean_fourth: float
    quantiles: dict[str, float | None]
    tail_means: dict[str, float | None]


@dataclass(frozen=True)
class ScoreErrorBounds:
    """What clean images tell of the score error at noise level `sigma` (per real channel).

    Attributes
    ----------
    denoising: of the denoising error ``|D - x_0| / (sigma sqrt(2 H W))``. Its moments and `tail_means` bound those of
        the score error from above; the quantiles are its own and bound nothing.
    lower_mean_square, lower_standard_error: an unbiased estimate (where no subject is in both halves of the images, and
        nearly so otherwise) of a number that ``E e^2`` exceeds, and its standard error.
    """

    sigma: float
    denoising: ErrorSummary
    lower_mean_square: float
    lower_standard_error: float

    @property
    def least(self) -> float:
        """The root mean square score error is above this: two standard errors below the estimate."""
        return math.sqrt(max(self.lower_mean_square - 2 * self.lower_standard_error, 0.0))

    @property
    def most(self) -> float:
        """The root mean square score error is below this."""
        return math.sqrt(self.denoising.mean_square)


def summarise(errors: Float[torch.Tensor, n]) -> ErrorSummary:
    """Moments, quantiles and tails of per-image errors; at least two."""
    ordered, square = errors.double().sort().values, errors.double().square()
    n = len(errors)
    quantiles, tails = {}, {}
    for share in SHARES:
        beyond = math.floor(n * (1 - share) + 1e-9)
        quantiles[f"{share:g}"] = float(ordered.quantile(share)) if beyond else None
        tails[f"{share:g}"] = float(ordered[-beyond:].mean()) if beyond else None
    return ErrorSummary(
        n, float(square.mean()), float(square.std()) / math.sqrt(n), float(square.square().mean()), quantiles, tails
    )


@torch.no_grad()
def score_error(denoiser: Prior, exact: Prior, clean: Images, sigma: float, seed: int = 0) -> Float[torch.Tensor, n]:
    """Errors ``[n]`` of a denoiser's score at level `sigma`, in the module's unit, where `exact` is ``E[x_0 | x]``.

    `clean` are draws of the prior that `exact` belongs to.
    """
    errors = [_rms(denoiser(x, sigma) - exact(x, sigma)) / sigma for x, _ in _noised(clean, sigma, seed)]
    return torch.cat(errors)


@torch.no_grad()
def difference(first: Prior, second: Prior, clean: Images, sigma: float, seed: int = 0) -> tuple[float, float]:
    """``E e^2`` of the first denoiser less that of the second, and its standard error, from clean images alone."""
    squares = [
        (_rms(first(x, sigma) - x_0) / sigma).square() - (_rms(second(x, sigma) - x_0) / sigma).square()
        for x, x_0 in _noised(clean, sigma, seed)
    ]
    gain = torch.cat(squares).double()
    return float(gain.mean()), float(gain.std()) / math.sqrt(len(gain))


@torch.no_grad()
def bounds(denoiser: Prior, clean: Images, sigma: float, seed: int = 0) -> ScoreErrorBounds:
    """Bounds of the score error at level `sigma` from held-out clean images; three evaluations per image.

    From below, the correction is linear in a few functions of ``(D, x)`` (see `_features`); its coefficients are fitted
    by least squares on every other image and judged on the rest, and the reverse.

    Raises
    ------
    ValueError: fewer than four images.
    """
    n = len(clean)
    if n < 4:
        raise ValueError(f"{n} images: two halves of at least two are needed")
    errors, gram, pull = [], [], []
    for x, x_0 in _noised(clean, sigma, seed):
        denoised = denoiser(x, sigma)
        residual = (x_0 - denoised) / sigma
        features = torch.view_as_real(_features(denoiser, x, denoised, sigma) / sigma).flatten(2).double()
        target = torch.view_as_real(residual).flatten(1).double() / features.shape[-1]
        errors.append(_rms(residual))
        gram.append(features @ features.mT / features.shape[-1])
        pull.append((features @ target[..., None])[..., 0])
    gram, pull = torch.cat(gram).cpu(), torch.cat(pull).cpu()
    gains = torch.empty(n, dtype=torch.float64)
    for judged in (slice(0, None, 2), slice(1, None, 2)):
        fitted = slice(1 - judged.start, None, 2)
        # Features of a denoiser without an error are zero or collinear: the pseudo-inverse leaves those alone.
        coefficients = torch.linalg.pinv(gram[fitted].mean(0), rtol=1e-8, hermitian=True) @ pull[fitted].mean(0)
        # |r|^2 - |r - c f|^2 of every image, from its moments.
        gains[judged] = 2 * pull[judged] @ coefficients - ((gram[judged] @ coefficients) @ coefficients)
    summary = summarise(torch.cat(errors).cpu())
    return ScoreErrorBounds(sigma, summary, float(gains.mean()), float(gains.std()) / math.sqrt(n))


def _features(denoiser: Prior, x: Images, denoised: Images, sigma: float) -> Complex[torch.Tensor, "n k H W"]:
    """Functions of the noisy image whose best combination corrects a denoiser.

    Four radial frequency bands of ``x - D``, to rescale what was removed; and what the denoiser says of the shifted and
    of the conjugate image, put back, less what it says of the image itself: images have no preferred pixel and no
    preferred sign of phase, so a better denoiser would answer alike.
    """
    spectrum = torch.fft.fft2(x - denoised)
    rows, columns = (torch.fft.fftfreq(n, device=x.device) * 2 for n in x.shape[-2:])
    radius = torch.hypot(rows[:, None], columns[None])
    bands = [torch.fft.ifft2(spectrum * ((radius >= low) & (radius < high))) for low, high in pairwise(BAND_EDGES)]
    shifted = denoiser(x.roll((1, 1), (-2, -1)), sigma).roll((-1, -1), (-2, -1))
    conjugated = denoiser(x.conj().resolve_conj(), sigma).conj()
    return torch.stack([*bands, shifted - denoised, conjugated - denoised], 1)


def _noised(clean: Images, sigma: float, seed: int, batch: int = 16) -> Iterator[tuple[Images, Images]]:
    """Batches of noisy and clean images; an image's noise depends on its index, the seed and the level alone."""
    for first in range(0, len(clean), batch):
        x_0 = clean[first : first + batch]
        seeds = [stable_seed("score error", seed, f"{sigma:g}", first + i) for i in range(len(x_0))]
        yield x_0 + sigma * NoiseStreams(seeds, clean.device, clean.dtype).complex(*clean.shape[1:]), x_0


def _rms(images: Images) -> Float[torch.Tensor, n]:
    """Per real channel."""
    return (images.abs().square().mean(dim=(-2, -1)) / 2).sqrt()
