"""Priors: any callable ``prior(x, sigma) -> E[x_0 | x = x_0 + sigma * noise]`` on complex images ``[n, H, W]``.

The variance-exploding denoiser is the one parametrisation of the package; the score of the smoothed prior
follows by Tweedie's formula, ``(D(x, sigma) - x) / sigma**2``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Complex

from mri_posterior.errors import UserError
from mri_posterior.priors.analytic import GaussianMixturePrior, GaussianPrior, RingPrior
from mri_posterior.priors.network import NetworkConfig, NetworkPrior

__all__ = ["GaussianMixturePrior", "GaussianPrior", "NetworkConfig", "NetworkPrior", "Prior", "RingPrior", "load_prior"]

SHIPPED = Path(__file__).parent / "shipped"


class Prior(Protocol):
    """A denoiser; `sigma` is per real channel, a number or one per image."""

    def __call__(
        self, x: Complex[torch.Tensor, "n H W"], sigma: float | torch.Tensor
    ) -> Complex[torch.Tensor, "n H W"]: ...


def prior_folder(name_or_path: str | Path) -> Path:
    """Where a prior lies: the name of a shipped one or a directory.

    Raises
    ------
    UserError: neither; the message lists the shipped ones.
    """
    for folder in (SHIPPED / name_or_path, Path(name_or_path)):
        if folder.is_dir():
            return folder
    shipped = ", ".join(sorted(p.name for p in SHIPPED.glob("*") if p.is_dir()))
    raise UserError(f"prior {name_or_path}: no such directory and not a shipped prior ({shipped}): set prior.name")


def load_prior(name_or_path: str | Path) -> NetworkPrior:
    """Load a learned prior by the name of a shipped one or by its directory. Nothing is unpickled.

    Raises
    ------
    UserError: not found, incomplete or broken.
    """
    return NetworkPrior.load(prior_folder(name_or_path))
