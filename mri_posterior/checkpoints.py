"""What an exact continuation of a training run needs: checkpoints without pickle, and tables cut back to them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mri_posterior.config import TrainingConfig
from mri_posterior.errors import UserError
from mri_posterior.files import atomic_path
from mri_posterior.priors import NetworkPrior, load_prior

CHECKPOINT = "training_state.safetensors"

# What a run may change between two checkpoints: where it runs and how often it reports. `steps` is among them, to train
# longer or to stop sooner.
_FREE = {"output", "input", "device", "workers", "compile", "steps", "title"}
_FREE |= {"checkpoint_every", "validate_every", "sheet_every", "sheet_images", "report_images"}

# The settings of a network that its weights depend on; the others say what it was trained on.
_ARCHITECTURE = ("channels", "layers", "patch", "sigma_data")


class StepTable:
    """A CSV file with one row per step that an interruption cannot make wrong.

    Rows after step `done`, which a resumed run is about to compute again, are removed, and so is a half-written one.
    Numbers are written with the digits that give back the same double.

    Raises
    ------
    UserError: the file is no such table, or cannot be written.
    """

    def __init__(self, path: str | Path, columns: Sequence[str], done: int):
        self.path = Path(path)
        header = ",".join(("step", *columns)) + "\n"
        kept = [header]
        if done and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            if lines[:1] != [header]:
                raise UserError(f"{self.path}: not the table of this run (its header differs): move it away")
            kept += [line for line in lines[1:] if line.endswith("\n") and int(line.partition(",")[0]) <= done]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(kept))
        self._file = open(self.path, "a")  # noqa: SIM115 (lives as long as the run)

    def append(self, step: int, values: Sequence[float]) -> None:
        """Add the row of `step`. It has left this process on return, so killing that does not lose it."""
        try:
            self._file.write(",".join((str(step), *map(repr, values))) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}): free space and resume") from error

    def sync(self) -> None:
        """Put the rows on the disk, where a power cut does not lose them either."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def save_checkpoint(
    config: TrainingConfig,
    step: int,
    prior: NetworkPrior,
    average: NetworkPrior,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Write the state after `step` steps to ``training_state.safetensors`` in ``config.output``, whole or not at all.

    Tensors are ``weights.*``, ``average.*`` and ``optimiser.<parameter>.<moment>``; metadata hold the step, the
    settings that make the run what it is, and the loss scale of ``fp16``.

    Raises
    ------
    UserError: the folder cannot be written or the disk is full.
    """
    from safetensors.torch import save_file

    tensors = {f"weights.{k}": v for k, v in prior.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    metadata = {"step": str(step), "config": json.dumps(_identity(config))}
    if scaler is not None:
        metadata["scaler"] = json.dumps(scaler.state_dict())
    with atomic_path(Path(config.output) / CHECKPOINT) as path:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata=metadata)


def load_checkpoint(
    config: TrainingConfig,
    prior: NetworkPrior,
    average: NetworkPrior,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> int:
    """Restore the last checkpoint in ``config.output``; the number of steps done, 0 when there is none.

    Settings that the checkpoint does not know, because it is older than they are, are not compared.

    Raises
    ------
    UserError: the file is broken, or of a run with other settings.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(config.output) / CHECKPOINT
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        step, known = int(metadata["step"]), json.loads(metadata["config"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: broken checkpoint ({error}): delete it to start again") from error
    changed = _difference(known, json.loads(json.dumps(_identity(config))))
    if changed is not None:
        raise UserError(
            f"{path}: checkpoint of another configuration ({changed} differs): choose another --output or delete it"
        )

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in part("optimiser.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    try:
        prior.load_state_dict(part("weights."))
        average.load_state_dict(part("average."))
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: does not fit the network ({reason}): choose another --output or delete it") from error
    if scaler is not None and "scaler" in metadata:
        scaler.load_state_dict(json.loads(metadata["scaler"]))
    return step


def load_initial_weights(config: TrainingConfig, prior: NetworkPrior) -> None:
    """Copy the weights of the prior ``config.init_from`` into `prior`, to go on from them with other images.

    Raises
    ------
    UserError: no such prior, or one of another network.
    """
    source = load_prior(config.init_from)
    for name in _ARCHITECTURE:
        theirs, ours = getattr(source.config, name), getattr(config.network, name)
        if theirs != ours:
            raise UserError(
                f"init_from {config.init_from}: its network.{name} is {theirs}, here it is {ours}: make them equal"
            )
    prior.load_state_dict(source.state_dict())


def _identity(config: TrainingConfig) -> dict[str, Any]:
    """The settings that make two runs the same run."""
    return {k: v for k, v in asdict(config).items() if k not in _FREE}


def _difference(known: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str | None:
    """The first setting in `known` that `wanted` gives another value; groups of settings are compared key by key."""
    for key, value in known.items():
        other = wanted.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            inner = _difference(value, other, f"{prefix}{key}.")
            if inner is not None:
                return inner
        elif value != other:
            return prefix + key
    return None
