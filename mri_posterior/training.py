"""Denoising score matching: the loop that makes a prior, on one device or many, resumable after any interruption."""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Complex, Float

from mri_posterior.checkpoints import load_checkpoint, load_initial_weights, save_checkpoint
from mri_posterior.config import TrainingConfig
from mri_posterior.device import pick_device
from mri_posterior.errors import UserError
from mri_posterior.files import atomic_path
from mri_posterior.noise import stable_seed
from mri_posterior.optimiser import OPTIMISERS
from mri_posterior.priors.network import NetworkConfig, NetworkPrior
from mri_posterior.training_data import TrainingData
from mri_posterior.training_report import (
    Pace,
    TrainingLog,
    model_card,
    open_training_data,
    prior_samples,
    report,
    validation_loss,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("mri_posterior")
Key = TypeVar("Key")
Drawn = TypeVar("Drawn")
MicroBatch = tuple[Complex[torch.Tensor, "n H W"], Float[torch.Tensor, " n"], Complex[torch.Tensor, "n H W"]]


def draw_sigma(n: int, network: NetworkConfig, generator: torch.Generator) -> Float[torch.Tensor, n]:
    """Noise levels to train on: mostly log-normal where images are decided, a fifth log-uniform over the whole range.

    The sampler spends its evaluations between 0.3 and 0.01, hence a centre lower than EDM's for natural images.
    """
    low, high = math.log(network.sigma_min), math.log(network.sigma_max)
    lognormal = math.log(0.08) + 1.3 * torch.randn(n, generator=generator)
    uniform = low + (high - low) * torch.rand(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.2, uniform, lognormal).clamp(low, high).exp()


def draw_micro_batch(config: TrainingConfig, data: TrainingData, step: int, index: int) -> MicroBatch:
    """Clean images, noise levels and white noise (level 1 per real channel) of micro-batch `index` of a step.

    All three depend on ``(seed, step, index)`` alone: which process or thread draws them, and when, is all one.
    """
    n = config.batch // config.micro_batches
    crop = config.crop_at(step)
    place = (step,) if config.micro_batches == 1 else (step, index)
    generator = torch.Generator().manual_seed(stable_seed(config.seed, "noise", *place))
    clean = data.batch((config.seed, *place), n, crop)
    sigma = draw_sigma(n, config.network, generator)
    return clean, sigma, torch.view_as_complex(torch.randn(*clean.shape, 2, generator=generator))


def ahead(draw: Callable[[Key], Drawn], keys: Iterable[Key], workers: int) -> Iterator[Drawn]:
    """``map(draw, keys)`` in which `workers` threads draw up to two items each ahead of their use; 0 draws on demand.

    Threads, not processes: drawing is torch and scipy code that runs outside of Python's lock, nothing has to be copied
    or to fit into shared memory, and nothing is left behind when the process is killed.
    """
    if workers == 0:
        yield from map(draw, keys)
        return
    pending: deque[Future[Drawn]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="draw") as pool:
        try:
            for key in keys:
                pending.append(pool.submit(draw, key))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def denoising_loss(
    prior: NetworkPrior,
    clean: Complex[torch.Tensor, "n H W"],
    sigma: Float[torch.Tensor, n],
    noise: Complex[torch.Tensor, "n H W"],
) -> Float[torch.Tensor, n]:
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


class _Loss(torch.nn.Module):
    """`denoising_loss` as a module: gradients are averaged over processes only for what passes through `forward`."""

    def __init__(self, prior: NetworkPrior):
        super().__init__()
        self.prior = prior

    def forward(self, clean, sigma, noise):
        return denoising_loss(self.prior, clean, sigma, noise)


def train(config: TrainingConfig) -> Path:
    """Train a prior by denoising score matching and write its directory, from the last checkpoint if there is one.

    Every process that ``torchrun`` or ``accelerate launch`` starts calls this; each computes its share of the
    micro-batches of a step, gradients are averaged, and the first one alone writes. Data and noise depend on seed, step
    and micro-batch (`draw_micro_batch`), and the checkpoint holds all the rest, so an interrupted run continues on the
    same curve: bit for bit on a CPU, with the same number of processes and threads.

    The directory gets what `NetworkPrior.save`, `report`, `save_checkpoint` and `TrainingLog` write.

    Raises
    ------
    UserError: unreadable training data, a checkpoint of another configuration, settings that this machine or this
        number of processes cannot serve, or a loss that became NaN or infinite (its batch is saved).
    """
    data = open_training_data(config)
    accelerator = _accelerator(config)
    try:
        average = _fit(config, data, accelerator)
        accelerator.wait_for_everyone()
    finally:
        accelerator.end_training()
    if not accelerator.is_main_process:
        return Path(config.output)
    average.save(config.output, model_card(config, sum(p.numel() for p in average.parameters()), []))
    return report(config, data)


def _accelerator(config: TrainingConfig) -> Accelerator:
    from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs

    device = pick_device(config.device)
    if config.precision != "no" and device.type != "cuda":
        raise UserError(
            f"precision {config.precision}: on a {device.type} half-precision convolutions are many times slower, not "
            "faster: set precision to no"
        )
    # The other processes wait at the next step while the first validates and draws samples.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=config.precision, kwargs_handlers=[patience])
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise UserError(f"{kind.value}: the network is not sharded: choose plain data parallelism in accelerate config")
    if not accelerator.is_main_process:
        log.setLevel(logging.WARNING)  # one voice is enough
    return accelerator


def _fit(config: TrainingConfig, data: TrainingData, accelerator: Accelerator) -> NetworkPrior:
    """The loop; returns the moving average of the network."""
    share = _own_micro_batches(config, accelerator)
    device = accelerator.device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stable_seed(config.seed, "initial weights"))
        prior = NetworkPrior(config.network)
    if config.init_from is not None:
        load_initial_weights(config, prior)
    prior = prior.to(device)
    average = copy.deepcopy(prior).requires_grad_(False)
    if config.compile:
        prior.unet.compile()  # in place: names of the weights stay
    rule = OPTIMISERS[config.optimiser](prior, config.learning_rate)
    network, optimiser = accelerator.prepare(_Loss(prior), rule)
    first = load_checkpoint(config, prior, average, rule, accelerator.scaler)
    _require_same_start(config, accelerator, first)
    n_parameters = sum(p.numel() for p in prior.parameters())
    log.info(
        "training %s: %.2f M parameters, steps %d to %d, %d process(es) on %s",
        config.title, n_parameters / 1e6, first, config.steps, accelerator.num_processes, device.type,
    )  # fmt: skip

    journal = TrainingLog(config.output, first) if accelerator.is_main_process else None
    workers = (0 if device.type == "cpu" else 2) if config.workers is None else config.workers
    keys = ((step, index) for step in range(first, config.steps) for index in share)
    batches = ahead(lambda key: draw_micro_batch(config, data, *key), keys, workers)
    pace = Pace(config, first, device)
    try:
        for step in range(first, config.steps):
            done = step + 1
            local = torch.zeros((), device=device)
            for index in share:
                clean, sigma, noise = (tensor.to(device, non_blocking=True) for tensor in next(batches))
                with nullcontext() if index == share[-1] else accelerator.no_sync(network):
                    loss = network(clean, sigma, noise).mean() / len(share)
                    accelerator.backward(loss)
                local += loss.detach()
            loss = float(accelerator.reduce(local, "mean"))
            gradient_norm = float(accelerator.clip_grad_norm_(prior.parameters(), config.clip))
            # Both are the same number in every process, so all of them stop here or none does. In fp16 an infinite
            # gradient is part of the search for the loss scale.
            if not (math.isfinite(loss) and (math.isfinite(gradient_norm) or config.precision == "fp16")):
                raise _not_finite(config, data, accelerator, step, loss)
            for group in rule.param_groups:
                group["lr"] = learning_rate(config, step)
            optimiser.step()
            optimiser.zero_grad()
            _update_average(average, prior, min(config.ema, (1 + step) / (10 + step)))
            if journal is None:
                continue
            journal.step(done, loss, learning_rate(config, step), gradient_norm)
            pace.step(done, loss)
            if config.validate_every and done % config.validate_every == 0:
                journal.validation(done, validation_loss(average, data, config.whole))
            if config.sheet_every and done % config.sheet_every == 0:
                images = prior_samples(average, config.whole, config.sheet_images, config.seed)
                if images is not None:
                    journal.samples(done, images)
            if done % config.checkpoint_every == 0 or done == config.steps:
                journal.sync()
                save_checkpoint(config, done, prior, average, rule, accelerator.scaler)
    finally:
        batches.close()
        if journal is not None:
            journal.close()
    return average


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up times cosine decay, at `step` counted from 0."""
    return (
        config.learning_rate * min(1, (step + 1) / config.warmup) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    )


def _own_micro_batches(config: TrainingConfig, accelerator: Accelerator) -> range:
    total, processes = config.micro_batches, accelerator.num_processes
    if total % processes:
        raise UserError(
            f"{processes} processes cannot share {total} micro-batch(es) equally: set micro_batch so that batch / "
            f"micro_batch ({config.batch} / {config.batch // total}) is a multiple of {processes}"
        )
    own = total // processes
    return range(own * accelerator.process_index, own * (accelerator.process_index + 1))


def _require_same_start(config: TrainingConfig, accelerator: Accelerator, first: int) -> None:
    starts = accelerator.gather(torch.tensor([first], device=accelerator.device))
    if bool((starts != first).any()):
        raise UserError(
            f"{config.output}: not all processes see the same checkpoint: choose an --output that all nodes share"
        )


def _not_finite(
    config: TrainingConfig, data: TrainingData, accelerator: Accelerator, step: int, loss: float
) -> UserError:
    """The error for a step whose loss or gradient is NaN or infinite, once its whole batch is in a file."""
    from safetensors.torch import save_file

    path = Path(config.output) / "nan_batch.safetensors"
    if accelerator.is_main_process:
        parts = [draw_micro_batch(config, data, step, i) for i in range(config.micro_batches)]
        clean, sigma, noise = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        content = {"clean": clean, "sigma": sigma, "noise": noise, "step": torch.tensor(step + 1)}
        with atomic_path(path) as temporary:
            save_file(content, temporary)
    accelerator.wait_for_everyone()  # the launcher ends the first process as soon as another one fails
    what = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
    return UserError(f"{path}: the {what} at step {step + 1}: inspect the batch saved there or lower learning_rate")


def _update_average(average: NetworkPrior, prior: NetworkPrior, decay: float) -> None:
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), prior.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)
