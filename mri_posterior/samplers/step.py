"""What samplers are made of: a plan of steps, and the state that a step turns into the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Complex, Float

from mri_posterior.noise import NoiseStreams
from mri_posterior.posterior import Posterior
from mri_posterior.samplers.preconditioner import ScalarPreconditioner, SolvedPreconditioner

Image = Complex[torch.Tensor, "n H W"]


@dataclass(frozen=True)
class Step:
    """One entry of a sampler's plan: which phase and level it belongs to."""

    phase: str
    level: int
    sigma: float
    next_sigma: float | None = None
    eta: float | None = None


@dataclass(frozen=True)
class State:
    """A batch of chains between two steps; each step returns a new one.

    Attributes
    ----------
    posterior: the target, with the Gaussian terms that the sampler itself added.
    x: the chains.
    denoised, log_ratio: previous evaluation and step of the multistep diffusion solver.
    back_projections: ``A^H y_i`` of every level, ``[levels, n, H, W]``: the only thing a level needs of ``y_i``.
    spectrum: local power spectrum of the prior, for the preconditioner.
    entered, preconditioner, noise: of the Langevin level under way, whose steps are all alike; `noise` is ``b_n``,
        which the next step uses again.
    """

    posterior: Posterior
    x: Image
    denoised: Image | None = None
    log_ratio: float = 0.0
    back_projections: Complex[torch.Tensor, "levels n H W"] | None = None
    spectrum: Float[torch.Tensor, "n H W"] | None = None
    entered: Step | None = None
    preconditioner: SolvedPreconditioner | ScalarPreconditioner | None = None
    noise: Image | None = None


class Sampler(Protocol):
    """A frozen dataclass that is also its own configuration schema. It owns no loop: `sample` does."""

    name: str
    sigma_min: float

    def plan(self, posterior: Posterior) -> list[Step]: ...

    def start(self, posterior: Posterior, streams: NoiseStreams, warm_start: Image | None) -> State: ...

    def step(self, streams: NoiseStreams, state: State, step: Step) -> State: ...
