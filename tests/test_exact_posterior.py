"""The heart of the suite: samplers against posteriors known in closed form.

Tolerances. With `n` independent samples whitened by the exact covariance, each of the `p` complex pixels
contributes two unit normals. Hence
- whitened mean: ``n * sum |mean|^2`` is chi-squared with ``2p`` degrees of freedom, standard deviation ``sqrt(4p)``;
- whitened variance, averaged over directions: mean 1, standard deviation ``sqrt(2 / (2 p n))``;
- a single direction's variance: standard deviation ``sqrt(2 / (2n))``.
Tests allow five standard deviations (one false alarm in 10^6), plus 1 % of variance where a finite number of Langevin
steps from the annealed start is part of what is tested.
"""

from __future__ import annotations

import math

import pytest
import torch

from mri_posterior.exact import GaussianProblem, coil_maps, dense, forward_matrix, gaussian_problem, line_mask, white
from mri_posterior.operator import SenseOperator
from mri_posterior.posterior import GaussianTerm, Posterior
from mri_posterior.priors import GaussianMixturePrior, GaussianPrior, RingPrior
from mri_posterior.samplers import SAMPLERS, sample

AnnealedLangevin = SAMPLERS["annealed_langevin"]
ReverseDiffusion = SAMPLERS["reverse_diffusion"]


def whitened(images: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Samples as unit normals ``[n, p]`` if they are what they should be."""
    factor = torch.linalg.cholesky(covariance)
    return torch.linalg.solve_triangular(factor, (images.flatten(1) - mean).T, upper=False).T


def assert_gaussian(problem: GaussianProblem, images: torch.Tensor, sigma_min: float, slack: float = 0.01) -> None:
    mean, covariance = problem.exact(sigma_min)
    unit = whitened(images, mean, covariance)
    n, p = unit.shape
    bias = n * float(unit.mean(0).abs().square().sum())
    assert abs(bias - 2 * p) < 5 * math.sqrt(4 * p) + slack * 2 * p, "mean"
    variance = float(unit.abs().square().mean()) / 2
    assert abs(variance - 1) < 5 / math.sqrt(p * n) + slack, "average variance"
    # The directions that the scan sees best and worst, where a sampler errs in different ways.
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    by_direction = ((images.flatten(1) - mean) @ vectors.conj()).abs().square().mean(0) / 2 / eigenvalues
    for name, part in (("observed", by_direction[: p // 4]), ("unobserved", by_direction[-p // 4 :])):
        assert abs(float(part.mean()) - 1) < 5 / math.sqrt(len(part) * n) + slack, name
    # Largest deviation over all p directions: 6 standard deviations keep the false-alarm rate at p * 2e-9.
    assert float((by_direction - 1).abs().max()) < 6 / math.sqrt(n) + slack, "worst direction"


@pytest.mark.parametrize(
    ("shape", "n_coils", "every", "eta"), [((8, 8), 1, 2, 0.05), ((9, 12), 2, 3, 0.02), ((24, 24), 3, 3, 0.03)]
)
def test_default_sampler_has_the_closed_form_mean_and_covariance(shape, n_coils, every, eta):
    problem = gaussian_problem(shape, n_coils, every, 4, eta)
    sampler = AnnealedLangevin()
    result = sample(sampler, problem.posterior, 400, seed=1)
    assert_gaussian(problem, result.images, sampler.sigma_min)
    assert result.n_evaluations <= 50


@pytest.mark.parametrize(
    "settings", [{"algorithm": 1, "levels": 12}, {"coupled_noise": False}, {"h": 1.2}, {"eta_share": 4.0, "levels": 8}]
)
def test_every_variant_of_the_fast_kernel_is_exact(settings):
    problem = gaussian_problem((12, 12), 2, 3, 4, 0.03)
    sampler = AnnealedLangevin(sigma_min=0.02, **settings)
    assert_gaussian(problem, sample(sampler, problem.posterior, 400, seed=2).images, 0.02)


@pytest.mark.parametrize("term_std", [0.1, 0.5])
def test_algorithm_2_samples_the_posterior_with_its_gaussian_term(term_std, generator):
    problem = gaussian_problem((12, 12), 2, 3, 4, 0.03)
    observation = problem.truth + term_std * white(generator, 12, 12)
    problem.posterior = problem.posterior.with_term(GaussianTerm(observation, term_std))
    sampler = AnnealedLangevin(algorithm=2, sigma_min=0.02, levels=12)
    assert_gaussian(problem, sample(sampler, problem.posterior, 400, seed=3).images, 0.02)


def test_algorithm_3_as_published_keeps_the_warm_starts_pull():
    """With the term kept, the law given ``x_0`` is ``N(m + C (x_0 - m)/s^2, C + C^2/s^2)``, C the covariance with
    the term.
    """
    problem = gaussian_problem((10, 10), 2, 3, 4, 0.03)
    std, sigma_min = 0.15, 0.02
    x_0 = torch.zeros(10, 10, dtype=torch.complex128)
    with_term = GaussianProblem(problem.posterior.with_term(GaussianTerm(x_0, std)), problem.spectrum, problem.truth)
    mean, inner = with_term.exact(sigma_min)
    covariance = inner + inner @ inner / std**2
    sampler = AnnealedLangevin(sigma_min=sigma_min, sigma_ws=std, guided=False, levels=12)
    unit = whitened(sample(sampler, problem.posterior, 600, seed=4, warm_start=x_0).images, mean, covariance)
    n, p = unit.shape
    assert abs(n * float(unit.mean(0).abs().square().sum()) - 2 * p) < 5 * math.sqrt(4 * p) + 0.01 * 2 * p
    assert abs(float(unit.abs().square().mean()) / 2 - 1) < 5 / math.sqrt(p * n) + 0.01


def test_plain_langevin_of_the_paper_reaches_the_same_posterior():
    """Euler, no preconditioner: a well-conditioned problem and many small steps, since that is what it needs.

    Euler's stationary variance is ``2/(2 - h lambda)`` too large in a direction of preconditioned curvature ``lambda
    <= 1``: 5 % at h = 0.1.
    """
    problem = gaussian_problem((6, 6), 1, 2, 2, 0.5)
    sampler = AnnealedLangevin(
        algorithm=1,
        sigma_min=0.5,
        kernel="ula",
        precondition="none",
        h=0.1,
        levels=4,
        steps_per_level=50,
        final_steps=300,
    )
    assert_gaussian(problem, sample(sampler, problem.posterior, 300, seed=5).images, 0.5, slack=0.06)


def test_euler_kernel_inflates_variance_as_theory_says():
    """The known bias ``2/(2 - h)``, and so a proof that this suite can see a wrong variance."""
    problem = gaussian_problem((10, 10), 2, 3, 4, 0.03)
    images = sample(
        AnnealedLangevin(algorithm=1, kernel="ula", h=0.5, levels=12, final_steps=30), problem.posterior, 400, seed=6
    ).images
    unit = whitened(images, *problem.exact(0.02))
    # The preconditioner's spectrum is an estimate, so the curvature lambda varies around 1: 10 % of the excess of 1/3.
    assert float(unit.abs().square().mean()) / 2 == pytest.approx(2 / (2 - 0.5), abs=0.04)
    # The mean's chi-squared, which comes first, grows by the same factor.
    with pytest.raises(AssertionError, match=r"mean|variance"):
        assert_gaussian(problem, images, 0.02)


def test_dense_and_spectral_gaussian_priors_give_the_same_samples():
    problem = gaussian_problem((8, 8), 2, 2, 4, 0.05)
    matrix = dense(lambda x: torch.fft.ifft2(problem.spectrum * torch.fft.fft2(x)), (8, 8))
    other = Posterior(
        GaussianPrior(covariance=matrix), *(getattr(problem.posterior, f) for f in ("operator", "kspace", "noise_std"))
    )
    a, b = (sample(AnnealedLangevin(), p, 4, seed=7).images for p in (problem.posterior, other))
    assert torch.allclose(a, b, atol=1e-6)


def test_single_precision_is_as_exact():
    problem = gaussian_problem((16, 16), 2, 3, 4, 0.03)
    operator = SenseOperator(problem.posterior.operator.maps.to(torch.complex64), problem.posterior.operator.mask)
    prior = GaussianPrior(spectrum=problem.spectrum.float())
    single = Posterior(prior, operator, problem.posterior.kspace.to(torch.complex64), problem.posterior.noise_std)
    images = sample(AnnealedLangevin(), single, 300, seed=8).images
    assert images.dtype == torch.complex64
    assert_gaussian(problem, images.to(torch.complex128), 0.02)


def test_reverse_diffusion_samples_the_prior():
    problem = gaussian_problem((8, 8), 1, 2, 4, 0.05)
    n = 800
    images = sample(ReverseDiffusion(sigma_max=50.0, sigma_min=0.02, steps=200), problem.posterior, n, seed=9).images
    variance = torch.fft.fft2(images, norm="ortho").abs().square().mean(0) / 2 / (problem.spectrum + 0.02**2)
    # 64 frequencies: the average has standard deviation 1/sqrt(64 n); 2 % for 200 steps over 8 octaves.
    assert float(variance.mean()) == pytest.approx(1, abs=5 / math.sqrt(64 * n) + 0.02)


def test_mixture_posterior_along_the_line_between_its_modes():
    """Two overlapping modes that the measurement tells apart only in part: mean and variance of the exact mixture
    posterior.

    Overlapping, because Langevin dynamics does not carry mass between separated modes (see the README's limits).
    """
    shape, eta, sigma_min = (4, 4), 0.5, 0.1
    operator = SenseOperator(coil_maps(1, shape), line_mask(shape, 2, 0))
    means = torch.stack([torch.full(shape, 0.09), torch.full(shape, -0.09)]).to(torch.complex128)
    weights, variance = torch.tensor([0.6, 0.4], dtype=torch.float64), 0.2**2
    prior = GaussianMixturePrior(weights, means, torch.full((1, 1, 1), variance, dtype=torch.float64))
    kspace = operator.forward(means[0])
    total = variance + sigma_min**2
    # Each component is conjugate: evidence N(y; A m_k, total A A^H + eta^2), posterior mean and covariance as for a
    # Gaussian prior.
    matrix = forward_matrix(operator)
    noise = total * matrix @ matrix.mH + eta**2 * torch.eye(len(matrix))
    offsets = kspace.flatten() - means.flatten(1) @ matrix.T
    solved = torch.linalg.solve(noise, offsets.T).T
    posterior_weights = torch.softmax(weights.log() - (offsets.conj() * solved).sum(1).real / 2, 0)
    centres = means.flatten(1) + total * solved @ matrix.conj()
    direction = torch.full((16,), 0.25, dtype=torch.complex128)
    covariance = total * torch.eye(16) - total**2 * matrix.mH @ torch.linalg.solve(noise, matrix)
    inner = float((direction @ covariance @ direction).real)
    positions = (centres @ direction).real
    mean = float(posterior_weights @ positions)
    spread = inner + float(posterior_weights @ positions**2) - mean**2

    n = 1500
    sampler = AnnealedLangevin(
        algorithm=1,
        sigma_min=sigma_min,
        precondition="scalar",
        h=0.3,
        diffusion_steps=60,
        levels=8,
        steps_per_level=20,
        final_steps=60,
    )
    images = sample(sampler, Posterior(prior, operator, kspace, eta), n, seed=10).images
    along = (images.flatten(1) @ direction).real
    assert spread > 1.3 * inner, "the modes must matter for this test"
    assert float(along.mean()) == pytest.approx(mean, abs=5 * math.sqrt(spread / n))
    # Variance of n draws of a law no heavier-tailed than a normal: relative standard deviation sqrt(2/n); 2 % for h
    # = 0.3.
    assert float(along.var()) == pytest.approx(spread, rel=5 * math.sqrt(2 / n) + 0.02)


def test_ring_prior_posterior_by_quadrature():
    """Figure 1's ring with one pixel, by the paper's plain kernel's faster cousin, against the density on a fine
    grid.
    """
    width, eta, sigma_min, y = 0.1, 0.6, 0.2, 0.8
    operator = SenseOperator(torch.ones(1, 1, 1, dtype=torch.complex128), torch.ones(1, 1, dtype=torch.bool))
    posterior = Posterior(RingPrior(1.0, width), operator, torch.full((1, 1, 1), y, dtype=torch.complex128), eta)
    sampler = AnnealedLangevin(
        algorithm=1,
        sigma_min=sigma_min,
        precondition="none",
        h=0.4,
        diffusion_steps=60,
        levels=6,
        steps_per_level=30,
        final_steps=150,
    )
    n = 2000
    x = sample(sampler, posterior, n, seed=11).images.flatten()

    axis = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64)
    grid = torch.complex(axis[:, None].expand(501, 501), axis[None].expand(501, 501))
    variance = width**2 + sigma_min**2
    log_ring = -((grid.abs() - 1) ** 2) / (2 * variance) + torch.special.i0e(grid.abs() / variance).log()
    density = torch.exp(log_ring - (grid - y).abs().square() / (2 * eta**2))
    density = density / density.sum()
    for statistic in (lambda z: z.real, lambda z: z.imag, torch.abs, lambda z: z.real**2, lambda z: z.imag**2):
        expected = float((density * statistic(grid)).sum())
        deviation = math.sqrt(float((density * statistic(grid) ** 2).sum()) - expected**2)
        assert float(statistic(x).mean()) == pytest.approx(expected, abs=5 * deviation / math.sqrt(n) + 0.01)
