"""A prior as a denoiser, beside denoisers that were never trained.

The image is complex with peak about 1 (its 99th percentile); white noise of known level is added to both channels. The
classical methods denoise real and imaginary part one by one, with the true level, and are given what no user has: the
strength with the best mean PSNR on these very slices, level by level. PSNR is ``-10 log10`` of the mean squared error
per real channel, for all methods alike.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Complex, Float
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet

from benchmarks.paper.style import table
from mri_posterior.noise import NoiseStreams, stable_seed
from mri_posterior.priors import Prior

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Images = Complex[torch.Tensor, "n H W"]
Channel = Float[np.ndarray, "H W"]


def wavelet(noisy: Channel, sigma: float, strength: float) -> Channel:
    """BayesShrink (Chang et al. 2000), averaged over shifts: the threshold follows each sub-band's own variance."""
    result = np.zeros_like(noisy)
    for shift in ((0, 0), (1, 2), (2, 1), (3, 3)):  # a wavelet basis has a grid of its own, which would show
        moved = denoise_wavelet(
            np.roll(noisy, shift, (0, 1)), strength * sigma, "db2", "soft", method="BayesShrink", rescale_sigma=False
        )
        result += np.roll(moved, (-shift[0], -shift[1]), (0, 1)) / 4
    return result


def total_variation(noisy: Channel, sigma: float, strength: float) -> Channel:
    """Rudin, Osher and Fatemi 1992 by Chambolle's algorithm."""
    return denoise_tv_chambolle(noisy, weight=strength * sigma, eps=1e-5, max_num_iter=500)


def nonlocal_means(noisy: Channel, sigma: float, strength: float) -> Channel:
    """Buades et al. 2005: BM3D's ancestor."""
    return denoise_nl_means(noisy, 5, 6, h=strength * sigma, sigma=sigma)


def bm3d(noisy: Channel, sigma: float, strength: float) -> Channel:
    from bm3d import bm3d as denoise

    return denoise(noisy, strength * sigma)


# Strengths are multiples of the noise level.
CLASSICAL: dict[str, tuple[Callable[[Channel, float, float], Channel], tuple[float, ...]]] = {
    "wavelet, untuned": (wavelet, (1.0,)),
    "wavelet": (wavelet, (0.7, 1.0, 1.4, 2.0, 2.8)),
    "TV": (total_variation, (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)),
    "non-local means": (nonlocal_means, (0.4, 0.6, 0.8, 1.0, 1.3, 1.7)),
}
if importlib.util.find_spec("bm3d"):
    CLASSICAL["BM3D"] = (bm3d, (0.8, 1.0, 1.2))


@dataclass(frozen=True)
class Level:
    """PSNR in dB of every slice by method, the prior first, and the classical methods' strengths."""

    sigma: float
    psnr: dict[str, Float[torch.Tensor, n]]
    strengths: dict[str, float]

    @property
    def gain(self) -> Float[torch.Tensor, n]:
        """Of the prior over the classical method that has the best mean at this level, slice by slice."""
        rivals = (scores for name, scores in self.psnr.items() if name != "prior")
        return self.psnr["prior"] - max(rivals, key=lambda scores: float(scores.mean()))


def psnr(clean: Images, image: Images) -> Float[torch.Tensor, n]:
    """In dB, of peak 1, per real channel."""
    return -10 * ((image - clean).abs().square().mean((1, 2)) / 2).log10()


@torch.no_grad()
def compare(prior: Prior, clean: Images, sigma: float, seed: int = 0) -> Level:
    """Denoise `clean` at one level with everything there is; a slice's noise depends on its index, seed and level."""
    seeds = [stable_seed("denoising", seed, f"{sigma:g}", i) for i in range(len(clean))]
    noisy = clean + sigma * NoiseStreams(seeds, dtype=clean.dtype).complex(*clean.shape[1:])
    denoised = torch.cat([prior(x, sigma) for x in noisy.split(8)])
    scores, strengths = {"prior": psnr(clean, denoised)}, {}
    for name, (method, grid) in CLASSICAL.items():
        runs = {s: psnr(clean, apply(method, noisy, sigma, s)) for s in grid}
        strengths[name] = max(runs, key=lambda s: float(runs[s].mean()))
        scores[name] = runs[strengths[name]]
    return Level(sigma, scores, strengths)


def apply(method: Callable[[Channel, float, float], Channel], noisy: Images, sigma: float, strength: float) -> Images:
    """`method` on real and imaginary parts."""
    channels = torch.view_as_real(noisy).movedim(-1, 1).flatten(0, 1).numpy()
    denoised = np.stack([method(channel, sigma, strength) for channel in channels])
    pairs = torch.from_numpy(denoised).unflatten(0, (-1, 2)).movedim(1, -1)
    return torch.view_as_complex(pairs.contiguous()).to(noisy.dtype)


def report(levels: list[Level]) -> str:
    """Median and range of the slices, dB; and the prior's gain over the best classical method of each level."""
    names = list(levels[0].psnr)
    rows = [(f"{x.sigma:g}", *(_spread(x.psnr[name]) for name in names), _spread(x.gain)) for x in levels]
    return table(("sigma", *names, "gain"), rows)


def _spread(values: Float[torch.Tensor, n]) -> str:
    return f"{float(values.quantile(0.5)):.1f} ({float(values.min()):.1f} to {float(values.max()):.1f})"
