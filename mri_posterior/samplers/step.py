"""What samplers are made of: a plan of steps, and the state that a step turns into the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Complex

from mri_posterior.errors import UserError
from mri_posterior.noise import NoiseStreams
from mri_posterior.posterior import Posterior

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

    A sampler that carries more from step to step has a subclass of its own.
    """

    interacting: ClassVar[bool] = False
    """Whether chains depend on one another, so that comparing them says nothing."""

    posterior: Posterior
    x: Image
    denoised: Image | None = None
    log_ratio: float = 0.0

    def report(self) -> dict[str, float]:
        """Numbers of this state worth keeping with the result."""
        return {}


class Sampler(Protocol):
    """A frozen dataclass that is also its own configuration schema. It owns no loop: `sample` does."""

    name: str
    sigma_min: float

    def plan(self, posterior: Posterior) -> list[Step]: ...

    def start(self, posterior: Posterior, streams: NoiseStreams, warm_start: Image | None) -> State: ...

    def step(self, streams: NoiseStreams, state: State, step: Step) -> State: ...


def require_at_least(sampler: object, least: int, *names: str) -> None:
    """Refuse settings below `least`, by name."""
    for name in names:
        if getattr(sampler, name) < least:
            raise UserError(f"sampler.{name} {getattr(sampler, name)}: it must be at least {least}")


def require_positive(sampler: object, *names: str) -> None:
    for name in names:
        if not getattr(sampler, name) > 0:
            raise UserError(f"sampler.{name} {getattr(sampler, name)}: it must be positive")


def refuse_terms(sampler: Sampler, posterior: Posterior) -> None:
    """Most samplers know the measurement alone."""
    if posterior.terms:
        raise ValueError(f"{sampler.name} knows no further Gaussian terms: use annealed_langevin")
