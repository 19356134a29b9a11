"""Denoising score matching: the loop that makes a prior, resumable after any interruption."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from mri_posterior.config import TrainingConfig
from mri_posterior.device import pick_device
from mri_posterior.errors import UserError
from mri_posterior.files import atomic_path
from mri_posterior.noise import stable_seed
from mri_posterior.priors.network import NetworkPrior
from mri_posterior.score_error import SHARES, ScoreErrorBounds, bounds
from mri_posterior.training_data import KneePhantoms, MagnitudeSlices, TrainingData

log = logging.getLogger("mri_posterior")
VALIDATION_SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0)


def open_training_data(config: TrainingConfig) -> TrainingData:
    return KneePhantoms() if config.dataset == "knee_phantom" else MagnitudeSlices(config.input)


def draw_sigma(n: int, prior: NetworkPrior, generator: torch.Generator) -> torch.Tensor:
    """Noise levels to train on: mostly log-normal where images are decided, a fifth log-uniform over the whole range.

    The sampler spends its evaluations between 0.3 and 0.01, hence a centre lower than EDM's for natural images.
    """
    low, high = math.log(prior.config.sigma_min), math.log(prior.config.sigma_max)
    lognormal = math.log(0.08) + 1.3 * torch.randn(n, generator=generator)
    uniform = low + (high - low) * torch.rand(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.2, uniform, lognormal).clamp(low, high).exp()


def denoising_loss(prior: NetworkPrior, clean: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """EDM's loss, ``E lambda(sigma) |D(x + sigma n) - x|^2`` with the weight that makes the network's target
    unit-variance.

    Per image, ``[n]``, and per real channel, so 1 is what predicting zero would give.
    """
    data = prior.config.sigma_data
    level = sigma[:, None, None]
    total = level**2 + data**2
    noisy = clean + level * noise
    target = (clean - data**2 / total * noisy) * total.sqrt() / (level * data)
    error = prior.raw(noisy / total.sqrt(), sigma) - target
    return error.abs().square().mean(dim=(1, 2)) / 2


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


def train(config: TrainingConfig) -> Path:
    """Train a prior by denoising score matching and write its directory, from the last checkpoint if there is one.

    The checkpoint (``training_state.safetensors`` beside the prior) holds weights, moving average and Adam's moments;
    data and noise of step `n` come from ``(seed, n)``, so an interrupted run continues on the same curve.

    Raises
    ------
    UserError: unreadable training data, or a checkpoint of another configuration.
    FloatingPointError: the loss became NaN or infinite.
    """
    folder = Path(config.output)
    data = open_training_data(config)
    device = pick_device(config.device)
    torch.manual_seed(stable_seed(config.seed, "initial weights"))
    prior, average = NetworkPrior(config.network).to(device), NetworkPrior(config.network).to(device)
    average.load_state_dict(prior.state_dict())
    optimiser = torch.optim.Adam(prior.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
    first = _load_checkpoint(folder, config, prior, average, optimiser)
    n_parameters = sum(p.numel() for p in prior.parameters())
    log.info("training %s: %.2f M parameters, steps %d to %d", config.title, n_parameters / 1e6, first, config.steps)

    running, started = 0.0, time.monotonic()
    for step in range(first, config.steps):
        generator = torch.Generator().manual_seed(stable_seed(config.seed, "noise", step))
        clean = data.batch((config.seed, step), config.batch, config.crop).to(device)
        sigma = draw_sigma(config.batch, prior, generator).to(device)
        noise = torch.view_as_complex(torch.randn(*clean.shape, 2, generator=generator)).to(device)
        loss = denoising_loss(prior, clean, sigma, noise).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}: lower learning_rate or inspect the data"
            )
        rate = (
            config.learning_rate
            * min(1, (step + 1) / config.warmup)
            * 0.5
            * (1 + math.cos(math.pi * step / config.steps))
        )
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimiser.step()
        _update_average(average, prior, min(config.ema, (1 + step) / (10 + step)))
        running = loss.item() if step == first else 0.99 * running + 0.01 * loss.item()
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - started) / (step + 1 - first)
            left = seconds * (config.steps - step - 1) / 60
            log.info(
                "step %d/%d  loss %.4f  %.2f s/step  %.0f min left", step + 1, config.steps, running, seconds, left
            )
        if (step + 1) % config.checkpoint_every == 0:
            _save_checkpoint(folder, config, step + 1, prior, average, optimiser)
        if (step + 1) % (4 * config.checkpoint_every) == 0:
            log.info("validation rms error per sigma: %s", validation_loss(average, data, config.crop))

    average.save(folder, model_card(config, n_parameters, []))
    return report(config, data)


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
    clean = data.batch(("validation",), config.report_images, config.crop, held_out=True)
    clean = clean.to(next(prior.parameters()).device)
    levels = []
    for sigma in VALIDATION_SIGMAS:
        levels.append(bounds(prior, clean, sigma, config.seed))
        log.info("sigma %g: score error between %.4f and %.4f", sigma, levels[-1].least, levels[-1].most)
    content = {
        "definition": "e = sigma |score error| / sqrt(2 H W), per image: see mri_posterior.score_error",
        "title": config.title,
        "images": len(clean),
        "crop": list(config.crop),
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
- Training: {config.steps} steps of {config.batch} images of {config.crop[0]}x{config.crop[1]}, seed {config.seed}

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


def _update_average(average: NetworkPrior, prior: NetworkPrior, decay: float) -> None:
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), prior.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)


def _save_checkpoint(folder: Path, config: TrainingConfig, step: int, prior, average, optimiser) -> None:
    from safetensors.torch import save_file

    tensors = {f"weights.{k}": v for k, v in prior.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    metadata = {"step": str(step), "config": json.dumps(_identity(config))}
    with atomic_path(folder / "training_state.safetensors") as path:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata=metadata)


def _load_checkpoint(folder: Path, config: TrainingConfig, prior, average, optimiser) -> int:
    """Restore the last checkpoint; the number of steps done, 0 when there is none."""
    from safetensors import SafetensorError, safe_open

    path = folder / "training_state.safetensors"
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path}: broken checkpoint ({error}): delete it to start again") from error
    known = json.loads(metadata["config"])
    if any(known.get(key) != value for key, value in json.loads(json.dumps(_identity(config))).items()):
        raise UserError(f"{path}: checkpoint of another configuration: choose another --output or delete it")
    part = lambda prefix: {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
    prior.load_state_dict(part("weights."))
    average.load_state_dict(part("average."))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in part("adam.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(metadata["step"])


def _identity(config: TrainingConfig) -> dict:
    """The settings that make two runs the same run; `steps` may change, to train longer or to stop sooner."""
    free = ("output", "input", "device", "checkpoint_every", "steps", "title", "report_images")
    return {k: v for k, v in asdict(config).items() if k not in free}
