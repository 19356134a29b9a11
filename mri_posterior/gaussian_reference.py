"""A Gaussian posterior of the scan's own size, known without a matrix, and samples judged against it.

**Target.** ``p_sigma_min(x) exp(-|y - A x|^2 / 2 eta^2)``, where ``p_sigma_min = N(0, K)``, ``K = S + sigma_min^2``,
and S is a falling power spectrum. It is Gaussian, of precision ``L = A^H A / eta^2 + K^-1`` and mean ``m = L^-1 A^H y /
eta^2``. The mean comes from conjugate gradients in double precision, exact draws from perturbing and solving,
``L e = A^H n_1 / eta + K^(-1/2) n_2`` (Papandreou and Yuille 2010).

**Figures.** Of each *part*, a quadratic form ``q(d) = d^H Q d`` of offsets ``d = x - m``:

- *spread*: root of the samples' variance in q over that of exact draws;
- *bias*: ``n q(mean d)`` over the samples' own variance in q: chi-squared over its degrees of freedom.

Parts are ``L`` (*everywhere*: all directions alike, in units of their standard deviation), ``A^H A / eta^2`` (*where
the data speak*), ``K^-1`` (*where the prior speaks*), and coarse and fine spatial frequencies in the image's own unit.
Besides, the Mahalanobis distance of the samples from `m` and their misfit to the data.

**Limits.** q of a draw is a weighted sum of unit chi-squares. Its mean ``E = 2 tr(QC)`` and variance ``4 tr(QCQC)``, C
the covariance per real channel, are those of E/v times a chi-squared of ``v = 2 E^2 / variance`` degrees of freedom
(Satterthwaite 1946). Hence spread^2 is F-distributed with ``v (n - 1)`` and ``v r`` degrees, r the number of exact
draws, and the bias with ``v`` and ``v (n - 1)``. Exact draws e_i, e_j estimate E by ``q(e_i)`` and the variance by
``|e_i^H Q e_j|^2``, i ≠ j; of ``L`` both are known: E = v = 2 x pixels. Quantiles are taken such that a right
sampler fails with probability `FALSE_ALARM` in all, and widened by what moves the coverage of 90 % intervals by
`COVERAGE` at most: a finite number of steps is part of every sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Complex, Float
from scipy import stats

from mri_posterior.exact import power_law, white
from mri_posterior.operator import SenseOperator
from mri_posterior.slices import MultiCoilSlice
from mri_posterior.solvers import conjugate_gradient

Images = Complex[torch.Tensor, "n H W"]
Quadratic = Callable[[Images], Images]

FALSE_ALARM = 1e-3
COVERAGE = 0.005
_Z = float(stats.norm.ppf(0.95))
# Standard deviations r times too large, or a mean b of them off, move a normal's coverage of its 90 % interval by
# 2 z phi(z) (r - 1) and, to second order, by -z phi(z) b^2.
SPREAD_SLACK = COVERAGE / (2 * _Z * float(stats.norm.pdf(_Z)))
BIAS_SLACK = COVERAGE / (_Z * float(stats.norm.pdf(_Z)))

RMS = 0.4  # of an image: about that of a head in normalised units, where the 99th percentile is 1
COARSE = 0.125  # cycles per pixel: half-periods of four pixels and more, what the mean of a region sees

EVERYWHERE, DATA, PRIOR = "everywhere", "where the data speak", "where the prior speaks"
PARTS = (EVERYWHERE, DATA, PRIOR, "in coarse structure", "in fine structure")


@dataclass(frozen=True)
class Check:
    """One figure of the samples and the range in which a right sampler's lies.

    Attributes
    ----------
    figure, part: for example ``spread``, ``where the data speak``.
    value, expected, standard_error: the error is the Monte-Carlo one of a right sampler.
    low, high: limits.
    bias: of the mean, in standard deviations, noise subtracted; of the figure ``bias`` only.
    """

    figure: str
    part: str
    value: float
    expected: float
    standard_error: float
    low: float
    high: float
    bias: float | None = None

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high  # NaN fails


@dataclass
class GaussianReference:
    """The exact posterior of a simulated measurement, matrix-free and in double precision on the CPU.

    Attributes
    ----------
    operator, noise_std: of the scan.
    variance: ``K``, the smoothed prior's spectrum in unshifted FFT order, per real channel.
    kspace: the simulated measurement.
    """

    operator: SenseOperator
    noise_std: float
    variance: Float[torch.Tensor, "H W"]
    kspace: Complex[torch.Tensor, "coils H W"]

    @classmethod
    def simulate(cls, slice_: MultiCoilSlice, sigma_min: float, seed: int) -> GaussianReference:
        """Draw an image of the smoothed prior and measure it as `slice_` was measured."""
        generator = torch.Generator().manual_seed(seed)
        operator = SenseOperator(slice_.maps.cpu().to(torch.complex128), slice_.mask.cpu())
        variance = prior_spectrum(operator.shape) + sigma_min**2
        truth = _filter(variance.sqrt(), white(generator, *operator.shape))
        noise = operator.mask * slice_.noise_std * white(generator, *operator.data_shape)
        return cls(operator, slice_.noise_std, variance, operator.forward(truth) + noise)

    def precision(self, x: Images) -> Images:
        """``L x``."""
        return self.operator.normal(x) / self.noise_std**2 + _filter(1 / self.variance, x)

    def solve(self, rhs: Images, tolerance: float) -> Images:
        """``L^-1 rhs``."""
        circulant = self.operator.circulant() / self.noise_std**2 + 1 / self.variance
        return conjugate_gradient(self.precision, rhs, lambda r: _filter(1 / circulant, r), tolerance, 5000)

    @cached_property
    def mean(self) -> Complex[torch.Tensor, "H W"]:
        return self.solve(self.operator.adjoint(self.kspace)[None] / self.noise_std**2, 1e-10)[0]

    def draws(self, n: int, seed: int) -> Images:
        """Exact draws of the posterior, less its mean."""
        generator = torch.Generator().manual_seed(seed)
        operator, draws = self.operator, []
        for _ in range(n):  # one by one: noise in every coil fills memory
            draws.append(operator.adjoint(white(generator, *operator.data_shape)) / self.noise_std)
            draws[-1] = draws[-1] + _filter(self.variance**-0.5, white(generator, *operator.shape))
        # Residuals of 1e-5 leave an error far below the draws' Monte-Carlo one.
        return self.solve(torch.stack(draws), 1e-5)

    def parts(self) -> dict[str, Quadratic]:
        """``Q`` of every part."""
        rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in self.operator.shape)
        coarse = (torch.hypot(rows[:, None], columns) <= COARSE).double()
        forms = (
            self.precision,
            lambda x: self.operator.normal(x) / self.noise_std**2,
            lambda x: _filter(1 / self.variance, x),
            lambda x: _filter(coarse, x),
            lambda x: _filter(1 - coarse, x),
        )
        return dict(zip(PARTS, forms, strict=True))

    def judge(self, images: Images, seed: int) -> list[Check]:
        """Samples, two or more, against the exact posterior."""
        n, pixels = len(images), self.mean.numel()
        alpha = FALSE_ALARM / (2 * len(PARTS) + 2)
        offsets = images.cpu().to(torch.complex128) - self.mean
        exact = self.draws(2 * n, seed)
        expectations = {name: _expectation(_gram(form, exact)) for name, form in self.parts().items()}
        expectations[EVERYWHERE] = Expectation(2 * pixels, 2 * pixels, math.inf)
        grams = {name: _gram(form, offsets) for name, form in self.parts().items()}
        checks = [_spread(name, grams[name], expectations[name], alpha) for name in PARTS]
        checks += [_bias(name, grams[name], expectations[name], alpha) for name in PARTS]
        return [*checks, self._mahalanobis(grams[EVERYWHERE], alpha), self._misfit(offsets, expectations[DATA], alpha)]

    def _mahalanobis(self, gram: Complex[torch.Tensor, "n n"], alpha: float) -> Check:
        """Mean of ``d^H L d`` over its degrees of freedom: of n right samples chi-squared of ``2 n pixels``."""
        freedom = 2 * len(gram) * self.mean.numel()
        low, high = (stats.chi2.ppf(p, freedom) / freedom for p in (alpha / 2, 1 - alpha / 2))
        return Check(
            "Mahalanobis²/dof",
            "of the samples",
            float(gram.diagonal().real.sum()) / freedom,
            1.0,
            math.sqrt(2 / freedom),
            low * (1 - SPREAD_SLACK) ** 2,
            high * (1 + SPREAD_SLACK) ** 2 + BIAS_SLACK,
        )

    @cached_property
    def _cross_variance(self) -> float:
        """``4 m^H K^-1 C K^-1 m``."""
        pull = _filter(1 / self.variance, self.mean[None])
        return 4 * float(torch.linalg.vecdot(pull.flatten(), self.solve(pull, 1e-5).flatten()).real)

    def _misfit(self, offsets: Images, data: Expectation, alpha: float) -> Check:
        """Mean of ``|y - A x|^2 / eta^2`` over twice the number of data.

        It is ``|y - A m|^2 / eta^2 + q(d) - 2 Re <K^-1 m, d>`` with q of `DATA`, since ``A^H (y - A m) / eta^2 = K^-1
        m``. The last term's variance is ``4 m^H K^-1 C K^-1 m``; it does not correlate with the second.
        """
        n, dof = len(offsets), 2 * len(self.operator.maps) * int(self.operator.mask.sum())

        def misfit(x: Images) -> torch.Tensor:
            return self.operator.residual(x, self.kspace).abs().square().sum(dim=(-3, -2, -1)) / self.noise_std**2

        expected = float(misfit(self.mean)) + data.value
        error = math.sqrt((data.variance + self._cross_variance) / n + data.variance / data.draws)
        value = torch.stack([misfit(self.mean + d) for d in offsets]).mean()  # one by one: the coils fill memory
        limit = error * float(stats.norm.isf(alpha / 2)) + data.value * ((1 + SPREAD_SLACK) ** 2 - 1 + BIAS_SLACK)
        return Check(
            "data χ²/dof",
            "of the samples",
            float(value) / dof,
            expected / dof,
            error / dof,
            (expected - limit) / dof,
            (expected + limit) / dof,
        )


def prior_spectrum(shape: tuple[int, int]) -> Float[torch.Tensor, "H W"]:
    """A spectrum that falls with the third power of spatial frequency, of images with a root mean square of `RMS`."""
    spectrum = power_law(shape)
    return spectrum * (RMS**2 / 2 / spectrum.mean())


@dataclass(frozen=True)
class Expectation:
    """A quadratic form of exact draws: mean, degrees of freedom, and how many draws tell (infinitely many: known)."""

    value: float
    freedom: float
    draws: float

    @property
    def variance(self) -> float:
        return 2 * self.value**2 / self.freedom


def _expectation(gram: Complex[torch.Tensor, "n n"]) -> Expectation:
    n, diagonal = len(gram), gram.diagonal().real
    value = float(diagonal.mean())
    variance = float(gram.abs().square().sum() - diagonal.square().sum()) / (n * (n - 1))
    return Expectation(value, 2 * value**2 / variance, n)


def _spread(part: str, gram: Complex[torch.Tensor, "n n"], exact: Expectation, alpha: float) -> Check:
    own, reference = exact.freedom * (len(gram) - 1), exact.freedom * exact.draws
    low, high = (math.sqrt(_f_quantile(p, own, reference)) for p in (alpha / 2, 1 - alpha / 2))
    return Check(
        "spread",
        part,
        math.sqrt(_variance(gram) / exact.value),
        1.0,
        math.sqrt((1 / own + 1 / reference) / 2),  # half the relative error of a variance
        low * (1 - SPREAD_SLACK),
        high * (1 + SPREAD_SLACK),
    )


def _bias(part: str, gram: Complex[torch.Tensor, "n n"], exact: Expectation, alpha: float) -> Check:
    n, variance, square = len(gram), _variance(gram), float(gram.real.mean())
    freedom = exact.freedom, exact.freedom * (n - 1)
    return Check(
        "bias",
        part,
        n * square / variance if variance > 0 else math.inf,  # samples that are all one image
        float(stats.f.mean(*freedom)),
        float(stats.f.std(*freedom)),
        0.0,
        _f_quantile(1 - alpha, *freedom) + n * BIAS_SLACK,
        bias=math.sqrt(max(square - variance / n, 0) / exact.value),
    )


def _f_quantile(probability: float, numerator: float, denominator: float) -> float:
    if math.isinf(denominator):
        return float(stats.chi2.ppf(probability, numerator)) / numerator
    return float(stats.f.ppf(probability, numerator, denominator))


def _variance(gram: Complex[torch.Tensor, "n n"]) -> float:
    """Unbiased variance of samples in a quadratic form, from their Gram matrix."""
    n = len(gram)
    return max(float(gram.diagonal().real.sum() - gram.real.sum() / n), 0.0) / (n - 1)  # rounding


def _gram(form: Quadratic, images: Images) -> Complex[torch.Tensor, "n n"]:
    return images.flatten(1).conj() @ form(images).flatten(1).T


def _filter(gain: Float[torch.Tensor, "H W"], x: Images) -> Images:
    return torch.fft.ifft2(gain * torch.fft.fft2(x))
