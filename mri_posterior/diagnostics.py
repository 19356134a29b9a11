"""Have the chains forgotten where they came from? Without a reference, from the chains alone."""

from __future__ import annotations

import torch
from jaxtyping import Float

from mri_posterior.posterior import ChainMoments

DISAGREE = 1.5
"""R-hat above which chains are in different places: far beyond the chance of a few short chains (see tests)."""


def rhat(chains: ChainMoments) -> Float[torch.Tensor, "H W"]:
    """Potential scale reduction per pixel (Gelman and Rubin 1992): near 1 where all chains roam the same values.

    Square root of the pooled variance over the variance within chains; real and imaginary part count as two draws of
    one quantity. Chains that keep different modes, or have not mixed, disagree more than each of them wanders.

    Raises
    ------
    ValueError: fewer than two chains.
    """
    if len(chains.mean) < 2:
        raise ValueError("R-hat compares chains: it needs at least two")
    within = chains.variance.mean(0)
    centred = chains.mean - chains.mean.mean(0)
    between = centred.abs().square().sum(0) / 2 / (len(chains.mean) - 1)
    pooled = within * (chains.steps - 1) / chains.steps + between
    return (pooled / within.clamp_min(torch.finfo(within.dtype).tiny)).sqrt()


def disagreeing_share(chains: ChainMoments) -> float:
    """Share of the pixels in which chains disagree.

    More than a few percent says that the posterior has several modes, of which each chain knows the one it came down
    in, or that the last level is too short: more ``final_steps``, or the sampler ``tempered_smc``.
    """
    return float((rhat(chains) > DISAGREE).double().mean())
