"""Posteriors with several separated modes: likelihood-tempered sequential Monte Carlo (Neal 2001; Del Moral 2006)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Complex, Float, Int
from scipy.cluster.hierarchy import leaves_list, linkage

from mri_posterior.noise import NoiseStreams
from mri_posterior.posterior import Posterior
from mri_posterior.samplers.langevin import LangevinKernel, LangevinState
from mri_posterior.samplers.reverse_diffusion import diffusion_step, diffusion_steps
from mri_posterior.samplers.step import Step, refuse_terms, require_at_least, require_positive

Image = Complex[torch.Tensor, "n H W"]


@dataclass(frozen=True)
class Population(LangevinState):
    """Particles of the prior times the likelihood to the power of a temperature, all of equal weight.

    Attributes
    ----------
    back_projection: ``A^H y``, the same for all levels.
    precision: ``1/eta_i^2`` of the tempered likelihood ``exp(-precision |y - A x|^2 / 2)``; 0 is the prior.
    visited, half_misfits: the particles after every move of the level, and their ``|y - A x|^2 / 2``.
    log_evidence: ``log E_p[exp(-precision |y - A x|^2 / 2)]`` so far.
    effective_size: smallest effective sample size so far, as a share of what was weighted.
    levels: of the likelihood so far.
    """

    interacting = True

    back_projection: Complex[torch.Tensor, "H W"] | None = None
    precision: float = 0.0
    visited: tuple[Image, ...] = ()
    half_misfits: tuple[Float[torch.Tensor, n], ...] = ()
    log_evidence: float = 0.0
    effective_size: float = 1.0
    levels: int = 0

    @property
    def eta(self) -> float:
        return self.precision**-0.5 if self.precision else math.inf

    def report(self) -> dict[str, float]:
        return {
            "tempered_eta": self.eta,
            "log_evidence": self.log_evidence,
            "effective_size": self.effective_size,
            "levels": self.levels,
        }


@dataclass(frozen=True)
class TemperedSMC(LangevinKernel):
    """Mode weights that Langevin dynamics alone cannot find.

    When modes differ mainly where nothing was measured they separate while the annealed likelihood still says little,
    and Langevin chains keep the *prior's* weights. Here particles start as samples of the prior; the likelihood is
    raised level by level, each time as far as keeps the effective sample size above `effective_size`; states are
    weighted by the exact ratio of likelihoods (the prior cancels, so no density is needed), resampled, and moved by
    Langevin steps that leave the level's target unchanged. Consistent as particles grow; the population must hold
    every mode when it leaves the prior, which takes hundreds of particles and problems of few effective dimensions.

    What is weighted is every state of a level, not the last ones alone (waste-free SMC, Dau and Chopin 2022): a mode
    of few particles then has many states to estimate its evidence from. Memory holds `moves` times the population.

    Particles interact by design: the batch of one `sample` call is one population, the only exception to samples being
    independent of their batch. Its result reports ``log_evidence`` (of ``E_p[exp(-|y - A x|^2 / 2 eta^2)]``, so without
    the likelihood's normaliser), ``effective_size`` and the ``levels`` it took.

    Attributes
    ----------
    sigma_min: smoothing of the prior in the target, per real channel.
    sigma_max, diffusion_steps: the reverse diffusion that draws from the prior.
    draws: draws of the prior per particle, all of which are weighted when the likelihood first enters. How many of
        them fell into each mode is the error that no later step can mend.
    levels: of the likelihood, at most. The last goes all the way; where that is farther than `effective_size` allows,
        the reported effective size shows it. Levels left over when the likelihood is complete are further moves.
    moves: Langevin steps per level.
    effective_size: as a share of the states.
    kernel, precondition, h, spectrum_probes, stability_probes, cg_tolerance, cg_iterations: see `LangevinKernel`.

    Evaluations: ``draws * diffusion_steps + levels * moves``, and 8 to learn the spectrum where that is asked for.
    """

    name: Literal["tempered_smc"] = "tempered_smc"
    sigma_min: float = 0.02
    sigma_max: float = 10.0
    diffusion_steps: int = 25
    draws: int = 4
    levels: int = 12
    moves: int = 12
    effective_size: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "sigma_min", "sigma_max", "effective_size")
        require_at_least(self, 1, "diffusion_steps", "draws", "levels", "moves")

    def plan(self, posterior: Posterior) -> list[Step]:
        steps = []
        for draw in range(self.draws):
            steps += diffusion_steps(self.sigma_max, self.sigma_min, self.diffusion_steps)
            steps += [Step("keep", draw, self.sigma_min)]
        for level in range(self.levels):
            steps += [Step("temper", level, self.sigma_min)]
            steps += [Step("langevin", level, self.sigma_min)] * self.moves
        return steps

    def start(self, posterior: Posterior, streams: NoiseStreams, warm_start: Image | None) -> Population:
        refuse_terms(self, posterior)
        x = self.sigma_max * streams.complex(*posterior.operator.shape)
        return Population(posterior, x, back_projection=posterior.operator.adjoint(posterior.kspace))

    def step(self, streams: NoiseStreams, state: Population, step: Step) -> Population:
        if step.phase == "diffusion":
            return diffusion_step(state.posterior.prior, streams, state, step)
        if step.phase == "keep":
            state = _visit(state)
            again = step.level < self.draws - 1
            x = self.sigma_max * streams.complex(*state.x.shape[1:]) if again else state.x
            return replace(state, x=x, denoised=None)
        if step.phase == "temper":
            return self._temper(streams, state, last=step.level == self.levels - 1)
        if step != state.entered:
            state = replace(self.enter(streams, state, replace(step, eta=state.eta)), entered=step)
        drift = state.posterior.score(state.x, step.sigma, state.back_projection, state.eta)
        return _visit(self.move(streams, state, drift))

    def _temper(self, streams: NoiseStreams, state: Population, last: bool) -> Population:
        """Raise the likelihood, weight all states of the level by its exact ratio, resample the population."""
        rise = state.posterior.noise_std**-2 - state.precision
        if rise <= 0:
            return replace(state, visited=(), half_misfits=())
        # States of one particle lie side by side, then and ever after those of one cluster: systematic resampling
        # takes its fair share of each stretch, so the modes' shares get no noise from it.
        x, half_misfit = torch.stack(state.visited, 1).flatten(0, 1), torch.stack(state.half_misfits, 1).flatten()
        if state.levels == 0:
            order = cluster_order(x)
            x, half_misfit = x[order], half_misfit[order]
        if not last:
            rise = largest_rise(half_misfit, rise, self.effective_size)
        log_weights = -rise * half_misfit
        weights = torch.softmax(log_weights, 0)
        chosen = systematic_resampling(weights, len(streams), float(streams.uniform()[0])).to(x.device)
        return replace(
            state,
            x=x[chosen],
            spectrum=None if state.spectrum is None else state.spectrum[chosen // len(state.visited)],
            precision=state.precision + rise,
            visited=(),
            half_misfits=(),
            log_evidence=state.log_evidence + float(torch.logsumexp(log_weights, 0)) - math.log(len(weights)),
            effective_size=min(state.effective_size, _effective_share(weights)),
            levels=state.levels + 1,
        )


def _visit(state: Population) -> Population:
    half_misfit = state.posterior.misfit(state.x) / 2
    return replace(state, visited=(*state.visited, state.x), half_misfits=(*state.half_misfits, half_misfit))


def cluster_order(images: Image) -> Int[torch.Tensor, n]:
    """An order in which images of one mode stand together: the leaves of Ward's tree (sorted resampling, Gerber,
    Chopin and Whiteley 2019).
    """
    if len(images) < 2:
        return torch.arange(len(images))
    tree = linkage(torch.view_as_real(images).flatten(1).cpu().numpy(), "ward")
    return torch.from_numpy(leaves_list(tree).astype("int64")).to(images.device)


def largest_rise(half_misfit: Float[torch.Tensor, n], most: float, share: float) -> float:
    """How far the precision may rise, at most `most`, before the effective sample size falls below `share`."""

    def size(rise: float) -> float:
        return _effective_share(torch.softmax(-rise * half_misfit, 0))

    if size(most) >= share:
        return most
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) >= share else (low, middle)
    # With `low` at 0 nothing would move: one particle has all of the weight at any rise.
    return low or high


def systematic_resampling(weights: Float[torch.Tensor, n], draws: int, offset: float) -> Int[torch.Tensor, draws]:
    """Indices, each drawn ``draws * weight`` times up to rounding, from one number in [0, 1) (Kitagawa 1996)."""
    positions = (torch.arange(draws, dtype=torch.float64) + offset) / draws
    return torch.searchsorted(weights.double().cpu().cumsum(0), positions).clamp_max(len(weights) - 1)


def _effective_share(weights: Float[torch.Tensor, n]) -> float:
    """Kish's effective sample size over the number of particles."""
    return 1 / float(weights.square().sum()) / len(weights)
