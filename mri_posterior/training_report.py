"""What training shows of itself: curves, validation, sample sheets, and the finished prior's errors and model card."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Complex

from mri_posterior.checkpoints import StepTable
from mri_posterior.config import TrainingConfig
from mri_posterior.device import pick_device
from mri_posterior.errors import UserError
from mri_posterior.files import atomic_path
from mri_posterior.image_operators import PixelMask
from mri_posterior.noise import stable_seed
from mri_posterior.posterior import Posterior
from mri_posterior.priors.network import NetworkPrior
from mri_posterior.samplers import ReverseDiffusion, SamplingFailed, sample
from mri_posterior.score_error import SHARES, ScoreErrorBounds, bounds
from mri_posterior.training_cache import ComplexSlices
from mri_posterior.training_data import KneePhantoms, MagnitudeSlices, TrainingData

log = logging.getLogger("mri_posterior")
VALIDATION_SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0)


class TrainingLog:
    """The curves of a run that has done `done` steps, as files in `folder`.

    ``losses.csv`` (every step: loss, learning rate, norm of the gradient before clipping), ``validation.csv`` (root
    mean square denoising error per sigma), ``samples/step_*.png``, and all of it once more as TensorBoard events in
    ``tensorboard``.

    Raises
    ------
    UserError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        self._losses = StepTable(self.folder / "losses.csv", ("loss", "learning_rate", "gradient_norm"), done)
        self._validation = StepTable(self.folder / "validation.csv", [f"{s:g}" for s in VALIDATION_SIGMAS], done)
        # Events of steps that are about to be computed again are hidden by TensorBoard, not removed from its files.
        self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=done + 1)

    def step(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        self._losses.append(step, (loss, learning_rate, gradient_norm))
        self._events.add_scalar("training/loss", loss, step)
        self._events.add_scalar("training/learning_rate", learning_rate, step)
        self._events.add_scalar("training/gradient_norm", gradient_norm, step)

    def validation(self, step: int, errors: dict[str, float]) -> None:
        log.info("step %d: validation rms error per sigma: %s", step, {s: f"{e:.4f}" for s, e in errors.items()})
        self._validation.append(step, list(errors.values()))
        for sigma, error in errors.items():
            self._events.add_scalar(f"validation/sigma_{sigma}", error, step)

    def samples(self, step: int, images: Complex[torch.Tensor, "n H W"]) -> None:
        """One column per image, magnitude above phase."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        complex_images = images.cpu().numpy()
        n, height, width = complex_images.shape
        top = float(np.percentile(np.abs(complex_images), 99.5)) or 1.0
        figure = Figure(figsize=(1.6 * n, 0.4 + 3.2 * height / width), facecolor="black")
        canvas = FigureCanvasAgg(figure)
        figure.suptitle(f"step {step}: samples of the prior, magnitude and phase", color="white", fontsize=9)
        for column, image in enumerate(complex_images):
            above, below = (figure.add_subplot(2, n, 1 + column + row * n) for row in (0, 1))
            above.imshow(np.abs(image), cmap="gray", vmin=0, vmax=top)
            below.imshow(np.angle(image), cmap="twilight", vmin=-np.pi, vmax=np.pi)
            above.set_axis_off()
            below.set_axis_off()
        figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.9, wspace=0.03, hspace=0.03)
        with atomic_path(self.folder / "samples" / f"step_{step:07d}.png") as path:
            figure.savefig(path, format="png", dpi=100, facecolor="black", metadata={"Software": None})
        canvas.draw()
        self._events.add_image("samples", np.array(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")

    def sync(self) -> None:
        """Put everything on the disk: before a checkpoint, which claims that the curve up to it is there."""
        self._losses.sync()
        self._validation.sync()
        self._events.flush()

    def close(self) -> None:
        self._losses.close()
        self._validation.close()
        self._events.close()


class Pace:
    """Says early how long the run will take and how much memory it needs, and now and then how far it is."""

    SETTLING, MEASURED, EVERY = 2, 5, 50  # steps: the first ones allocate, choose algorithms, compile

    def __init__(self, config: TrainingConfig, first: int, device: torch.device):
        self._config, self._first, self._device = config, first, device
        self._started = time.monotonic()
        self._running = math.nan

    def step(self, done: int, loss: float) -> None:
        now, steps = time.monotonic(), self._config.steps
        own = done - self._first
        self._running = loss if own == 1 else 0.99 * self._running + 0.01 * loss
        if own == self.SETTLING:
            self._started = now
        seconds = (now - self._started) / max(own - self.SETTLING, 1)
        left = seconds * (steps - done) / 60
        if own == self.SETTLING + self.MEASURED:
            size = _memory(self._device) / 1e9
            log.info("%.2g s/step, %.1f GB, %d steps: %.0f min", seconds, size, steps - done, left)
        if done % self.EVERY == 0:
            log.info("step %d/%d  loss %.4f  %.2g s/step  %.0f min left", done, steps, self._running, seconds, left)


def _memory(device: torch.device) -> int:
    """Bytes that this process has needed so far on its GPU, or of main memory now."""
    import psutil

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def open_training_data(config: TrainingConfig) -> TrainingData:
    if config.dataset == "knee_phantom":
        return KneePhantoms()
    if config.dataset == "complex":
        return ComplexSlices(config.input)
    return MagnitudeSlices(config.input, config.template_share)


@torch.no_grad()
def validation_loss(prior: NetworkPrior, data: TrainingData, crop: tuple[int, int], n: int = 64) -> dict[str, float]:
    """Root mean square denoising error per real channel on held-out subjects, for each of `VALIDATION_SIGMAS`."""
    device = next(prior.parameters()).device
    clean = data.batch(("validation",), n, crop, held_out=True).to(device)
    generator = torch.Generator().manual_seed(stable_seed("validation"))
    errors = {}
    for sigma in VALIDATION_SIGMAS:
        noise = torch.randn(*clean.shape, 2, generator=generator)
        noisy = clean + sigma * torch.view_as_complex(noise).to(device)
        squares = [
            (prior(x, sigma) - c).abs().square() / 2 for x, c in zip(noisy.split(16), clean.split(16), strict=True)
        ]
        errors[f"{sigma:g}"] = float(torch.cat(squares).mean().sqrt())
    return errors


def prior_samples(
    prior: NetworkPrior, crop: tuple[int, int], n: int, seed: int
) -> Complex[torch.Tensor, "n H W"] | None:
    """Draw `n` images of the prior alone by reverse diffusion; the same noise for any state of the network.

    None where a chain diverged: a network early in training may well do that, which is no reason to stop.
    """
    blind = PixelMask(torch.zeros(crop, dtype=torch.bool, device=next(prior.parameters()).device))
    posterior = Posterior(prior, blind, torch.zeros(crop, dtype=blind.dtype, device=blind.device), noise_std=1.0)
    sampler = ReverseDiffusion(sigma_max=prior.config.sigma_max, sigma_min=prior.config.sigma_min, steps=40)
    try:
        return sample(sampler, posterior, n, seed, key=("sheet",)).images
    except SamplingFailed as error:
        log.warning("no samples of the prior: %s", error)
        return None


def report(config: TrainingConfig, data: TrainingData | None = None) -> Path:
    """Measure the prior in ``config.output`` on held-out images: write its ``score_error.json`` and model card anew.

    Weights and configuration of the prior stay as they are.

    Raises
    ------
    UserError: no prior there, or one of another network than `config` describes; unreadable images.
    """
    folder = Path(config.output)
    prior = NetworkPrior.load(folder).to(pick_device(config.device))
    if prior.config != config.network:
        raise UserError(f"{folder}: its config.json is of another network than this configuration: give its own")
    data = open_training_data(config) if data is None else data
    clean = data.batch(("validation",), config.report_images, config.whole, held_out=True)
    clean = clean.to(next(prior.parameters()).device)
    levels = []
    for sigma in VALIDATION_SIGMAS:
        levels.append(bounds(prior, clean, sigma, config.seed))
        log.info("sigma %g: score error between %.4f and %.4f", sigma, levels[-1].least, levels[-1].most)
    content = {
        "definition": "e = sigma |score error| / sqrt(2 H W), per image: see mri_posterior.score_error",
        "title": config.title,
        "images": len(clean),
        "crop": list(config.whole),
        "seed": config.seed,
        "levels": [asdict(level) for level in levels],
    }
    with atomic_path(folder / "score_error.json") as path:
        path.write_text(json.dumps(content, indent=1) + "\n")
    with atomic_path(folder / "README.md") as path:
        path.write_text(model_card(config, sum(p.numel() for p in prior.parameters()), levels))
    return folder


def model_card(config: TrainingConfig, n_parameters: int, levels: list[ScoreErrorBounds]) -> str:
    """The prior's ``README.md``: what it is, what it saw, how well it denoises, and what it must not be used for."""
    network = config.network
    rows = "\n".join(_error_row(level) for level in levels)
    n_images = levels[0].denoising.images if levels else 0
    start = f"the weights of {config.init_from}" if config.init_from else "random weights"
    late = f", {config.whole[0]}x{config.whole[1]} for the last {config.late_steps}" if config.late_steps else ""
    convolutions = "" if config.precision == "no" else f", convolutions in {config.precision}"
    return f"""# {config.title}

A denoiser `D(x, sigma) = E[x_0 | x]` for complex MR images, used as prior by `mri_posterior`.

- Anatomy: {network.anatomy}
- Training data: {network.training_data}
- Licence of the training data: {network.licence}
- Network: U-Net on {network.patch}x{network.patch}-unshuffled pixels, widths {list(network.channels)},
  {network.layers} block(s) per resolution,
  {n_parameters / 1e6:.2f} M parameters; EDM preconditioning, sigma_data {network.sigma_data}
- Noise levels: {network.sigma_min} to {network.sigma_max} per real channel, images scaled to a 99th
  percentile of about 1
- Voxel size: {network.voxel_size_mm[0]} to {network.voxel_size_mm[1]} mm
- Training: {config.steps} steps of {config.batch} images of {config.crop[0]}x{config.crop[1]}{late},
  seed {config.seed}, {config.optimiser} at {config.learning_rate:g}, starting from {start}{convolutions}

## Denoising and score error on held-out subjects

Measured on {n_images} images. *Denoising error*: root mean square of `D(x, sigma) - x_0` per real channel. *Score
error* `e`: root mean square of `sigma * (score - true score)` per real channel, so 1 is the size of the noise's own
score. The true score is not known, so only bounds are given. The denoising error over sigma bounds it from above,
loosely: most of that no denoiser can know. What a few corrections, fitted to other images, take off the denoising
error was the network's own and bounds it from below (given less two standard errors). The last columns bound
`(E e^4)^(1/4)`, and the score error that 50, 90, 99 and 99.9 % of the images stay below.

| sigma | denoising error | score error at least | at most | fourth moment | 50 % | 90 % | 99 % | 99.9 % |
|---|---|---|---|---|---|---|---|---|
{rows}

All numbers are in `score_error.json`; `mri_posterior/score_error.py` defines them.

## Limits

Research only, never for diagnosis. It knows the anatomy and contrast above and nothing else: pathology, other
contrasts, other body parts and finer voxels are outside of what it has seen, and uncertainty maps made with it do
not include that.
"""


def _error_row(level: ScoreErrorBounds) -> str:
    tails = (level.denoising.tail_means[f"{share:g}"] for share in SHARES)
    numbers = (level.least, level.most, level.denoising.mean_fourth**0.25, *tails)
    columns = " | ".join("-" if number is None else f"{number:.3g}" for number in numbers)
    return f"| {level.sigma:g} | {level.sigma * level.most:.4f} | {columns} |"
