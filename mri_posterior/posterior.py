"""The target, ``p_sigma_min(x) exp(-|y - A x|^2 / 2 eta^2)`` with optional Gaussian terms, and samples from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Complex, Float

from mri_posterior.operator import LinearOperator
from mri_posterior.priors import Prior


@dataclass(frozen=True)
class GaussianTerm:
    """An extra observation ``mean = x + std * noise`` of the whole image: Algorithm 2's noised warm start.

    `mean` is ``[H, W]``, or ``[n, H, W]`` with one per sample; `std` is per real channel.
    """

    mean: Complex[torch.Tensor, "*n H W"]
    std: float


@dataclass(frozen=True)
class Posterior:
    """A prior and what was measured.

    Attributes
    ----------
    prior: denoiser ``prior(x, sigma) -> E[x_0 | x]`` on complex ``[n, H, W]``.
    operator: ``A``; its device and precision are those of the samples.
    kspace: ``y = A x + noise_std * n``, of the operator's `data_shape` (``[coils, H, W]`` in MRI); only the sampled
        entries are used.
    noise_std: per real channel. There is no default: a wrong one makes every error bar wrong.
    terms: further Gaussian observations.

    Raises
    ------
    ValueError: a noise level that is not positive, or k-space that does not fit the operator.
    """

    prior: Prior
    operator: LinearOperator
    kspace: Complex[torch.Tensor, "*data"]
    noise_std: float
    terms: tuple[GaussianTerm, ...] = ()

    def __post_init__(self):
        if not self.noise_std > 0:
            raise ValueError(f"noise_std must be positive, got {self.noise_std}")
        if tuple(self.kspace.shape) != tuple(self.operator.data_shape):
            raise ValueError(
                f"k-space {tuple(self.kspace.shape)} does not fit the operator's {tuple(self.operator.data_shape)}"
            )

    def with_term(self, term: GaussianTerm) -> Posterior:
        return replace(self, terms=(*self.terms, term))

    @property
    def term_precision(self) -> float:
        """``sum 1/std^2`` over the Gaussian terms."""
        return sum(1 / term.std**2 for term in self.terms)

    def misfit(self, x: Complex[torch.Tensor, "n H W"]) -> Float[torch.Tensor, n]:
        """``|y - A x|^2`` per image, in double precision: differences of log-likelihoods are small among large."""
        residual = self.operator.residual(x, self.kspace).flatten(1)
        return torch.view_as_real(residual).double().square().sum(dim=(1, 2))

    def prior_score(self, x: Complex[torch.Tensor, "n H W"], sigma: float) -> Complex[torch.Tensor, "n H W"]:
        """``grad log p_sigma(x)`` by Tweedie's formula."""
        return (self.prior(x, sigma) - x) / sigma**2

    def score(self, x, sigma: float, back_projection, eta: float) -> Complex[torch.Tensor, "n H W"]:
        """``grad log`` of the target in which ``A^H y`` is `back_projection` and the noise level is `eta`."""
        drift = self.prior_score(x, sigma) + (back_projection - self.operator.normal(x)) / eta**2
        for term in self.terms:
            drift = drift + (term.mean - x) / term.std**2
        return drift


@dataclass(frozen=True)
class StepRecord:
    """What happened in one step, and what the sampler itself reports of it: for diagnosis."""

    phase: str
    sigma: float
    eta: float | None
    rms_change: float
    report: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ChainMoments:
    """Each chain over the steps of its last level, in which it should have forgotten where it came from.

    Attributes
    ----------
    mean: ``[n, H, W]``.
    variance: ``[n, H, W]``, unbiased, per real channel.
    steps: how many.
    """

    mean: Complex[torch.Tensor, "n H W"]
    variance: Float[torch.Tensor, "n H W"]
    steps: int


@dataclass(frozen=True)
class PosteriorSamples:
    """Samples of one slice.

    Attributes
    ----------
    images: ``[n, H, W]``, in the units of the posterior's k-space.
    n_evaluations: network evaluations per sample.
    records: one per step; averages over the samples.
    sigma_min: the prior's smoothing in the target ``p_sigma_min(x) * likelihood``, per real channel.
    seeds: of each sample.
    report: what the sampler has to say of the result, such as ``log_evidence``.
    chains: of samplers that end in several steps of one level; None for those whose draws are independent by design.
    """

    images: Complex[torch.Tensor, "n H W"]
    n_evaluations: int
    records: list[StepRecord] = field(repr=False)
    sigma_min: float = 0.0
    seeds: tuple[int, ...] = ()
    report: dict[str, float] = field(default_factory=dict)
    chains: ChainMoments | None = field(default=None, repr=False)


def join_batches(batches: Sequence[PosteriorSamples]) -> PosteriorSamples:
    """The samples of one slice that were drawn batch by batch; step records and report are those of the last."""
    chains = None
    if all(batch.chains is not None for batch in batches):
        means, variances = ([getattr(b.chains, name) for b in batches] for name in ("mean", "variance"))
        chains = ChainMoments(torch.cat(means), torch.cat(variances), batches[-1].chains.steps)
    return replace(
        batches[-1],
        images=torch.cat([batch.images for batch in batches]),
        seeds=sum((batch.seeds for batch in batches), ()),
        chains=chains,
    )
