"""Is a learned prior any good? What it draws, how it denoises, and whether it has learned its images by heart.

    python -m benchmarks.prior_checks --prior brain_t1_2mm --input ixi_brain_t1_2mm.h5 --write

*Samples.* Unconditional draws of ``p_sigma_min``, in three ways (`benchmarks.unconditional`) of equally many
evaluations. Pictures and the search for neighbours use the first way and its last denoising step.

*Denoising.* Held-out slices, beside classical methods at their best (`benchmarks.denoising`).

*Fréchet distance.* Squared, times 1000, of fixed Gabor features (`mri_posterior.distances`) between equally many
images, noise of sigma_min added to those that have none; mean and standard deviation over random draws of the reference
set. So few images bias it upwards, in all rows alike: only rows of one table compare. A perfect prior would be where
the training images are, drawn with the augmentation that it is trained with.

*Neighbours.* The distance of two magnitudes is the sine of the angle between them, so brightness is of no account, and
the nearest training slice is looked for over mirrors and shifts up to 8 pixels. Augmented training images show what
memory would look like: half of them are neither turned nor zoomed, and near their originals. A prior that did not
memorise has samples no nearer than slices of new subjects. Blurred samples are a little nearer to everything than sharp
ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from jaxtyping import Complex, Float
from matplotlib.figure import Figure
from torch.nn import functional

from benchmarks import denoising, unconditional
from benchmarks.exactness import put_between
from benchmarks.paper.style import table
from mri_posterior import cli
from mri_posterior.augmentation import percentile
from mri_posterior.distances import frechet_distance, gabor_features
from mri_posterior.errors import UserError
from mri_posterior.exact import white
from mri_posterior.files import atomic_path
from mri_posterior.noise import stable_seed
from mri_posterior.priors import Prior, load_prior
from mri_posterior.progress import progress_view
from mri_posterior.training_data import MagnitudeSlices

ROOT = Path(__file__).parents[1]
SHAPE = (120, 96)
POOL, FAR = 4, 8  # pixels of the coarse search, and how far shifts go
Images = Complex[torch.Tensor, "n H W"]
Magnitudes = Float[torch.Tensor, "n H W"]


@dataclass(frozen=True)
class Neighbours:
    """The nearest training slice of each image: its distance, and the slice as it was shifted and mirrored."""

    distance: Float[torch.Tensor, n]
    index: torch.Tensor
    images: Magnitudes


def nearest(images: Magnitudes, training: torch.Tensor, shortlist: int = 64) -> Neighbours:
    """The nearest of `training` ``[N, h, w]`` (any real type) to each image; see the module's text.

    All slices are compared at a quarter of the resolution, then the `shortlist` nearest at full resolution.
    """
    shape = images.shape[1:]
    coarse = torch.cat([_unit(functional.avg_pool2d(_frame(x, shape), POOL)) for x in training.split(512)])
    offsets, found = range(-FAR, FAR + 1), []
    for image in images:
        # Mirrors and shifts of the image stand in for those of the training slices.
        moves = list(product((False, True), offsets, offsets))
        rough = [v for v in moves if v[1] % POOL == 0 and v[2] % POOL == 0]
        views = _unit(functional.avg_pool2d(torch.stack([_move(image, *v) for v in rough]), POOL))
        chosen = (views @ coarse.T).amax(0).topk(min(shortlist, len(coarse))).indices
        candidates = _frame(training[chosen], shape)
        cosine = _unit(torch.stack([_move(image, *v) for v in moves])) @ _unit(candidates).T
        move, candidate = divmod(int(cosine.argmax()), len(chosen))
        mirrored, rows, columns = moves[move]
        slice_ = candidates[candidate].roll((-rows, -columns), (0, 1))
        slice_ = slice_.flip(-1) if mirrored else slice_
        # From the difference of the unit images, since 1 - cosine^2 loses all digits of a small distance.
        a, b = _unit(image[None])[0].double(), _unit(slice_[None])[0].double()
        half = float((a - b).norm()) / 2
        sine = 2 * half * max(0.0, 1 - half**2) ** 0.5
        found.append((sine, int(chosen[candidate]), slice_))
    distance, index, neighbours = zip(*found, strict=True)
    return Neighbours(torch.tensor(distance), torch.tensor(index), torch.stack(neighbours))


def _move(image: torch.Tensor, mirrored: bool, rows: int, columns: int) -> torch.Tensor:
    return (image.flip(-1) if mirrored else image).roll((rows, columns), (0, 1))


def _frame(images: torch.Tensor, shape: Sequence[int]) -> Magnitudes:
    """Centred in a frame of `shape`, cut or padded with zeros."""
    rows, columns = (size - have for size, have in zip(shape, images.shape[-2:], strict=True))
    return functional.pad(images.float(), (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def _unit(images: Magnitudes) -> Float[torch.Tensor, "n pixels"]:
    return functional.normalize(images.flatten(1), dim=1)


def gaussian_twin(images: Images, n: int, generator: torch.Generator) -> Images:
    """Draws of the stationary Gaussian that has the images' mean and mean power spectrum: a prior with no anatomy."""
    mean = images.mean(0)
    spectrum = torch.fft.fft2(images - mean, norm="ortho").abs().square().mean(0) / 2
    noise = white(generator, n, *images.shape[1:], dtype=images.dtype)
    return mean + torch.fft.ifft2(spectrum.sqrt() * torch.fft.fft2(noise))


def frechet_table(
    draws: dict[str, Images], data: MagnitudeSlices, sigma_min: float, repeats: int, seed: int = 0
) -> str:
    """Distances of draws of ``p_sigma_min`` from held-out and training images, above those of reference sets."""
    n, shape = (lambda x: (len(x), tuple(x.shape[1:])))(next(iter(draws.values())))
    generator = torch.Generator().manual_seed(stable_seed("Fréchet", seed))
    size = 10 * n
    held_out = data.batch(("Fréchet", seed), size, shape, held_out=True)
    training = data.batch(("Fréchet", seed), size, shape)
    clean = {"held-out": held_out, "training": training, "Gaussian": gaussian_twin(training, size, generator)}
    features = {
        name: gabor_features(x + sigma_min * white(generator, *x.shape, dtype=x.dtype)) for name, x in clean.items()
    }

    def pick(pool: torch.Tensor, n: int) -> torch.Tensor:
        return pool[torch.randperm(len(pool), generator=generator)[:n]]

    def against(rows: torch.Tensor, reference: str) -> str:
        own, distances = rows is features[reference], []
        for _ in range(repeats):
            # Two disjoint sets where both come from one pool.
            other = pick(features[reference], 2 * n)
            mine = other[n:] if own else pick(rows, n)
            distances.append(1000 * frechet_distance(mine, other[:n]))
        values = torch.tensor(distances)
        return f"{float(values.mean()):.1f} ± {float(values.std()):.1f}"

    sets = {f"samples, {name}": gabor_features(x) for name, x in draws.items()}
    sets |= {
        "training images, augmented": features["training"],
        "held-out images": features["held-out"],
        "Gaussian of the training images' spectrum": features["Gaussian"],
    }
    rows = [(name, against(x, "held-out"), against(x, "training")) for name, x in sets.items()]
    return table((f"{n} images of", "from held-out", "from training"), rows)


def ratio_interval(
    a: Float[torch.Tensor, n], b: Float[torch.Tensor, m], generator: torch.Generator, repeats: int = 2000
) -> tuple[float, float, float]:
    """Ratio of the medians of `a` and `b`, and the ends of its 95 % bootstrap interval (percentiles)."""
    medians = [x[torch.randint(len(x), (repeats, len(x)), generator=generator)].quantile(0.5, dim=1) for x in (a, b)]
    low, high = (medians[0] / medians[1]).quantile(torch.tensor([0.025, 0.975])).tolist()
    return float(a.quantile(0.5) / b.quantile(0.5)), low, high


def neighbour_table(found: dict[str, Neighbours], seed: int = 0) -> str:
    """Distances to the nearest training slice, and their median over that of held-out slices."""
    generator = torch.Generator().manual_seed(stable_seed("bootstrap", seed))
    rows = []
    for name, neighbours in found.items():
        d = neighbours.distance
        ratio, low, high = ratio_interval(d, found["held-out slices"].distance, generator)
        over = "1" if name == "held-out slices" else f"{ratio:.2f} ({low:.2f} to {high:.2f})"
        low_end = (f"{float(d.quantile(share)):.3f}" for share in (0.5, 0.25, 0.0))
        rows.append((f"{len(d)} {name}", *low_end, over))
    return table(("", "median distance", "lower quartile", "smallest", "median over held-out's (95 %)"), rows)


def samples_figure(samples: Images, held_out: Images) -> Figure:
    """Two rows of samples above two of held-out slices, one brightness for all, and the phase of the first of each."""
    columns = min(8, len(samples) // 2, len(held_out) // 2)
    blocks = [
        ("samples", samples[: 2 * columns].abs(), False),
        ("held-out", held_out[: 2 * columns].abs(), False),
        ("phase of samples", samples[:columns], True),
        ("phase of held-out", held_out[:columns], True),
    ]
    rows = [(title, x, phase) for title, images, phase in blocks for x in images.split(columns)]
    return _sheet(rows, columns)


def neighbours_figure(samples: Magnitudes, found: Neighbours) -> Figure:
    """The eight samples nearest to a training slice, above those slices."""
    order = found.distance.argsort()[:8]
    peaks = [x[order] / percentile(x[order]) for x in (samples, found.images)]
    titles = [f"{d:.3f}" for d in found.distance[order].tolist()]
    return _sheet([("sample", peaks[0], False), ("nearest slice", peaks[1], False)], len(order), titles)


def _sheet(rows: Sequence[tuple[str, torch.Tensor, bool]], columns: int, titles: Sequence[str] = ()) -> Figure:
    height, width = rows[0][1].shape[1:]
    each = 1.2
    figure = Figure(figsize=(columns * each + 0.3, len(rows) * each * height / width + 0.2), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for panels, (label, images, phase) in zip(axes, rows, strict=True):
        panels[0].set_ylabel(label, fontsize=8)
        for panel, image in zip(panels, images, strict=True):
            panel.set(xticks=[], yticks=[])
            if phase:
                # Where there is no signal the phase is that of noise.
                angle = torch.where(image.abs() > 0.1, image.angle(), torch.nan)
                panel.imshow(angle.numpy(), cmap="coolwarm", vmin=-1, vmax=1)
            else:
                panel.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1.2)
    for panel, title in zip(axes[0], titles, strict=False):
        panel.set_title(title, fontsize=7)
    return figure


def save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90, metadata={"Software": None})


def check(
    prior: Prior, data: MagnitudeSlices, n: int, sigma_min: float, seed: int, evaluations: int, slices: int
) -> tuple[str, dict[str, Figure]]:
    """All checks: their tables as Markdown, and figures by name."""
    held_out = data.batch(("validation",), n, SHAPE, held_out=True)
    draws: dict[str, Images] = {}
    ways = unconditional.ways(sigma_min, evaluations)
    with progress_view("prior checks", len(ways) * n) as progress:
        for i, (name, sampler) in enumerate(ways.items()):
            draws[name] = unconditional.draw(
                prior, sampler, n, SHAPE, seed, progress=lambda done, first=i * n: progress(first + done)
            )
    first = next(iter(draws.values()))
    with torch.no_grad():
        samples = torch.cat([prior(x, sigma_min) for x in first.split(8)])
    levels = [denoising.compare(prior, held_out[:slices], sigma, seed) for sigma in denoising.SIGMAS]
    training = data.slices()
    found = {
        "samples": nearest(samples.abs(), training),
        "held-out slices": nearest(held_out.abs(), training),
        "augmented training images": nearest(data.batch(("neighbours",), n, SHAPE).abs(), training),
    }
    brightness = [f"{float(percentile(x.abs()).quantile(0.5)):.2f}" for x in (samples, held_out)]
    text = f"""### Unconditional samples

{n} draws per way, {evaluations} evaluations each, sigma_min {sigma_min:g}. Median 99th percentile of the magnitude:
samples {brightness[0]}, held-out {brightness[1]}.

{frechet_table(draws, data, sigma_min, 5 if n < 16 else 20, seed)}

### Denoising: PSNR in dB, median (range) of {slices} held-out slices

{denoising.report(levels)}

### Nearest training slice

{neighbour_table(found, seed)}"""
    figures = {
        "prior_samples": samples_figure(samples, held_out),
        "prior_nearest": neighbours_figure(samples.abs(), found["samples"]),
    }
    return text, figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="brain_t1_2mm", help="a shipped prior or a prior's directory")
    parser.add_argument("--input", metavar="FILE", help="the magnitude slices it was trained on, and held-out ones")
    parser.add_argument("--samples", type=int, default=48, help="draws per way, and images they are compared with")
    parser.add_argument("--sigma-min", type=float, default=0.02, help="smoothing of the prior")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few samples and evaluations: to see that it runs")
    parser.add_argument("--write", action="store_true", help="put tables and pictures into docs/")
    options = parser.parse_args(arguments)
    if options.samples < 4:
        raise UserError(f"--samples {options.samples}: distances between sets of images need at least 4")
    prior, data = load_prior(options.prior), MagnitudeSlices(options.input)
    n, evaluations, slices = (4, 12, 2) if options.quick else (options.samples, 120, min(24, options.samples))
    text, figures = check(prior, data, n, options.sigma_min, options.seed, evaluations, slices)
    print(text)
    if options.write:
        text = f"Prior: `{Path(options.prior).name}`.\n\n{text}"
        put_between(ROOT / "docs" / "prior_checks.md", "prior checks", text)
        for name, figure in figures.items():
            save(figure, ROOT / "docs" / "figures" / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
