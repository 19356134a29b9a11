"""What is remembered of chains while they run: enough to judge whether they have mixed."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Complex

from mri_posterior.posterior import ChainMoments

MOST_STATES = 32
"""States of the last level that a batch holds at once: at 320 x 320 pixels 26 MB a chain, dropped when it ends."""


class ChainRecorder:
    """Moments of each chain over its last level: of all steps online (Welford 1962), the others from kept states.

    Parameters
    ----------
    steps: of the level. More than `MOST_STATES` are thinned evenly, such that the last one is kept.
    keep_states: hand the kept states out with the result.
    """

    def __init__(self, steps: int, keep_states: bool = False):
        self.stride = -(-steps // MOST_STATES)
        self.offset = steps % self.stride
        self.keep_states = keep_states
        self.steps, self.mean, self.squares = 0, 0.0, 0.0
        self.states: list[torch.Tensor] = []

    def add(self, x: Complex[torch.Tensor, "n H W"]) -> None:
        self.steps += 1
        offset = x - self.mean
        self.mean = self.mean + offset / self.steps
        self.squares = self.squares + (offset.conj() * (x - self.mean)).real / 2
        if self.steps % self.stride == self.offset:
            self.states.append(x)

    def result(self) -> ChainMoments | None:
        """None for fewer than two steps: samplers that end in a single one have no chains to compare."""
        if self.steps < 2:
            return None
        states = torch.stack(self.states, 1)
        return replace(
            ChainMoments.of(states),
            mean=self.mean,
            variance=self.squares / (self.steps - 1),
            steps=self.steps,
            states=states if self.keep_states else None,
        )
