"""Which device to compute on."""

from __future__ import annotations

import torch

from mri_posterior.errors import UserError


def pick_device(name: str) -> torch.device:
    """The torch device of a ``--device`` argument; ``auto`` prefers CUDA, then MPS.

    Raises
    ------
    UserError: a device that this machine does not have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, here in available.items() if here)
    if not available[name]:
        raise UserError(f"device {name}: not available on this machine: use --device auto or cpu")
    return torch.device(name)
