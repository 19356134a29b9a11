"""Problems with known posteriors, against brute force: what judges the samplers must be right itself.

Where a quantity is estimated from `n` draws, tests allow five standard errors, computed where they are used.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mri_posterior.exact import (
    GaussianProblem,
    MixtureProblem,
    RingProblem,
    dense,
    forward_matrix,
    gaussian_problem,
    line_mask,
    mixture_problem,
    ring_problem,
    white,
)
from mri_posterior.operator import LinearOperator
from mri_posterior.posterior import GaussianTerm, Posterior

SIGMA_MIN = 0.05


class MatrixOperator(LinearOperator):
    """The least an operator can be: two maps and their shapes."""

    def __init__(self, matrix: torch.Tensor, shape: tuple[int, int], data_shape: tuple[int, ...] | None = None):
        self.matrix, self.shape = matrix, shape
        self.data_shape = (len(matrix),) if data_shape is None else data_shape
        self.dtype, self.device = matrix.dtype, matrix.device

    def forward(self, image):
        return (image.flatten(-2) @ self.matrix.T).unflatten(-1, self.data_shape)

    def adjoint(self, data):
        return (data.flatten(-len(self.data_shape)) @ self.matrix.conj()).unflatten(-1, self.shape)


def as_matrix(problem: GaussianProblem) -> GaussianProblem:
    """The same problem, of an operator that nothing is known about."""
    old = problem.posterior
    operator = MatrixOperator(forward_matrix(old.operator), old.operator.shape, old.operator.data_shape)
    return GaussianProblem(Posterior(old.prior, operator, old.kspace, old.noise_std), problem.spectrum, problem.truth)


def assert_unit_normals(unit: torch.Tensor) -> None:
    """Mean: ``n sum |mean|^2`` is chi-squared with 2p degrees of freedom. Second moments ``u u^H / 2``: every entry has
    variance ``1/n`` about the identity's; the sum of their squares is ``p^2 / n``, standard deviation at most ``sqrt(2)
    p / n`` (squares of unit normals on the diagonal, exponentials beside it).
    """
    n, p = unit.shape
    assert abs(n * float(unit.mean(0).abs().square().sum()) - 2 * p) < 5 * math.sqrt(4 * p)
    excess = unit.T @ unit.conj() / (2 * n) - torch.eye(p)
    assert abs(n * float(excess.abs().square().sum()) - p**2) < 5 * math.sqrt(2) * p


PROBLEMS = {
    "diagonal": lambda: gaussian_problem((4, 5), 1, 2, 1, 0.1),
    "dense": lambda: gaussian_problem((5, 4), 2, 3, 1, 0.1),
    "any operator": lambda: as_matrix(gaussian_problem((4, 5), 1, 2, 1, 0.1)),
}


@pytest.fixture(params=PROBLEMS)
def problem(request) -> GaussianProblem:
    return PROBLEMS[request.param]()


def test_exact_moments_solve_the_normal_equations(problem):
    """Prior covariance ``K``, joint Gaussian of x and y: ``K A^H (A K A^H + eta^2)^-1 y`` and what it leaves of K."""
    mean, covariance = problem.exact(SIGMA_MIN)
    matrix, eta = forward_matrix(problem.posterior.operator), problem.posterior.noise_std
    spectrum = problem.spectrum + SIGMA_MIN**2
    prior = dense(lambda x: torch.fft.ifft2(spectrum * torch.fft.fft2(x)), problem.posterior.operator.shape)
    evidence = matrix @ prior @ matrix.mH + eta**2 * torch.eye(len(matrix))
    gain = torch.linalg.solve(evidence, matrix @ prior).mH
    assert torch.allclose(mean, gain @ problem.posterior.kspace.flatten(), atol=1e-9)
    assert torch.allclose(covariance, prior - gain @ matrix @ prior, atol=1e-9)


def test_whiten_turns_the_exact_law_into_unit_normals(problem):
    """Its linear part ``L`` obeys ``L C L^H = I`` and the exact mean becomes zero: no draw is needed to see it."""
    mean, covariance = problem.exact(SIGMA_MIN)
    shape = problem.posterior.operator.shape
    at_mean, gain = problem.whiten(mean.reshape(1, *shape), SIGMA_MIN)
    assert float(at_mean.abs().max()) < 1e-8
    offset = problem.whiten(torch.zeros(1, *shape, dtype=torch.complex128), SIGMA_MIN)[0]
    linear = dense(lambda x: problem.whiten(x, SIGMA_MIN)[0] - offset, shape)
    assert torch.allclose(linear @ covariance @ linear.mH, torch.eye(len(mean), dtype=torch.complex128), atol=1e-8)
    matrix = forward_matrix(problem.posterior.operator) / problem.posterior.noise_std
    spectrum = problem.spectrum + SIGMA_MIN**2
    root = dense(lambda x: torch.fft.ifft2(spectrum.sqrt() * torch.fft.fft2(x)), shape)
    eigenvalues = torch.linalg.eigvalsh(root @ matrix.mH @ matrix @ root)
    assert torch.allclose(gain.sort().values, eigenvalues, atol=1e-8 * float(eigenvalues.max()))


def test_exact_samples_of_a_gaussian(problem, generator):
    images = problem.exact_samples(4000, SIGMA_MIN, generator)
    mean, covariance = problem.exact(SIGMA_MIN)
    factor = torch.linalg.cholesky(covariance)
    assert_unit_normals(torch.linalg.solve_triangular(factor, (images.flatten(1) - mean).T, upper=False).T)


def test_the_diagonal_path_is_the_dense_one(generator):
    fast = PROBLEMS["diagonal"]()
    slow = as_matrix(fast)
    for a, b in zip(fast.exact(SIGMA_MIN), slow.exact(SIGMA_MIN), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    images = white(generator, 3, 4, 5)
    (a, gain_a), (b, gain_b) = fast.whiten(images, SIGMA_MIN), slow.whiten(images, SIGMA_MIN)
    # Bases differ by rotations among equal eigenvalues; the norm does not.
    assert torch.allclose(a.abs().square().sum(1), b.abs().square().sum(1), rtol=1e-8)
    assert torch.allclose(gain_a.sort().values, gain_b.sort().values, atol=1e-6)


def test_single_precision_problems_have_the_same_law():
    double, single = (gaussian_problem((5, 4), 2, 3, 1, 0.1, dtype=d) for d in (torch.complex128, torch.complex64))
    for a, b in zip(double.exact(SIGMA_MIN), single.exact(SIGMA_MIN), strict=True):
        # float32 data (2^-24) over eta^2 = 0.01, a few hundred operations.
        assert torch.allclose(a, b, atol=1e-4)
    (a, gain_a), (b, gain_b) = (problem.whiten(double.truth[None], SIGMA_MIN) for problem in (double, single))
    assert torch.allclose(gain_a, gain_b, atol=1e-4 * float(gain_a.max()))
    assert float(a.abs().square().sum()) == pytest.approx(float(b.abs().square().sum()), rel=1e-3)


def test_gaussian_terms_are_in_exact_and_refused_where_they_are_not():
    problem = PROBLEMS["dense"]()
    mean, covariance = problem.exact(SIGMA_MIN)
    observation = torch.full((5, 4), 0.3 + 0.1j, dtype=torch.complex128)
    problem.posterior = problem.posterior.with_term(GaussianTerm(observation, 0.2))
    with_term = problem.exact(SIGMA_MIN)
    # Kalman's update with the observation ``mean = x + 0.2 n``.
    gain = covariance @ torch.linalg.inv(covariance + 0.2**2 * torch.eye(20))
    assert torch.allclose(with_term[0], mean + gain @ (observation.flatten() - mean), atol=1e-9)
    assert torch.allclose(with_term[1], covariance - gain @ covariance, atol=1e-9)
    with pytest.raises(ValueError, match="use exact"):
        problem.whiten(observation[None], SIGMA_MIN)
    mixture = small_mixture()
    mixture.posterior = mixture.posterior.with_term(GaussianTerm(mixture.means[0], 0.2))
    with pytest.raises(ValueError, match="Gaussian terms"):
        mixture.exact_weights(SIGMA_MIN)


def small_mixture() -> MixtureProblem:
    return mixture_problem(3, (2, 4), seed=2)


def prior_draws(problem: MixtureProblem, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Modes and images of the smoothed prior."""
    mode = torch.multinomial(problem.weights, n, replacement=True, generator=generator)
    spread = math.sqrt(problem.variance + SIGMA_MIN**2)
    return mode, problem.means[mode] + spread * white(generator, n, *problem.means.shape[1:])


def test_mixture_evidence_and_weights_by_monte_carlo(generator):
    problem, n = small_mixture(), 100_000
    mode, images = prior_draws(problem, n, generator)
    likelihood = torch.exp(-problem.posterior.misfit(images) / (2 * problem.posterior.noise_std**2))
    relative = float(likelihood.std() / likelihood.mean()) / math.sqrt(n)
    assert relative < 0.02, "too few draws hit the data for this test to say anything"
    assert problem.log_evidence(SIGMA_MIN) == pytest.approx(math.log(likelihood.mean()), abs=5 * relative)
    weights = problem.exact_weights(SIGMA_MIN)
    for k in range(3):
        share = likelihood * (mode == k)
        # Ratio of means: its error is that of (share - w likelihood) over the mean likelihood.
        error = float((share - weights[k] * likelihood).std() / likelihood.mean()) / math.sqrt(n)
        assert float(share.mean() / likelihood.mean()) == pytest.approx(float(weights[k]), abs=5 * error)


def test_data_beyond_the_mask_say_nothing():
    problem = small_mixture()
    before = problem.log_evidence(SIGMA_MIN), problem.exact_weights(SIGMA_MIN)
    kspace = problem.posterior.kspace + ~problem.posterior.operator.mask * 3.0
    problem.posterior = replace(problem.posterior, kspace=kspace)
    assert problem.log_evidence(SIGMA_MIN) == pytest.approx(before[0], abs=1e-10)
    assert torch.allclose(problem.exact_weights(SIGMA_MIN), before[1])


def test_exact_samples_of_a_mixture_by_importance_weights(generator):
    """Means and second moments of every pixel, against prior draws weighted by their likelihood."""
    problem, n, m = small_mixture(), 100_000, 20_000
    _, images = prior_draws(problem, n, generator)
    likelihood = torch.exp(-problem.posterior.misfit(images) / (2 * problem.posterior.noise_std**2))
    weights = likelihood / likelihood.mean()
    exact = problem.exact_samples(m, SIGMA_MIN, generator)
    for statistic in (lambda z: z.real, lambda z: z.imag, lambda z: z.abs().square()):
        a, b = statistic(images), statistic(exact)
        expected = (weights[:, None, None] * a).mean(0)
        error = ((weights[:, None, None] * (a - expected)).std(0) / math.sqrt(n)).hypot(b.std(0) / math.sqrt(m))
        assert ((b.mean(0) - expected).abs() < 5 * error).all()
    share = problem.weights_of(exact, SIGMA_MIN)
    # Responsibilities vary no more than indicators would.
    for k, weight in enumerate(problem.exact_weights(SIGMA_MIN).tolist()):
        assert float(share[k]) == pytest.approx(weight, abs=5 * math.sqrt(weight * (1 - weight) / m))


@pytest.fixture(params=[None, GaussianTerm(torch.tensor([[0.2 + 0.9j]], dtype=torch.complex128), 0.5)])
def ring(request) -> RingProblem:
    return ring_problem(width=0.15, term=request.param)


def test_ring_density_is_the_integral_over_the_circle(ring):
    """Without Bessel functions: ``p_sigma`` as the mean of 720 Gaussians along the circle (0.0087 apart, 0.16 wide: the
    sum of a smooth periodic function, exact to rounding).
    """
    grid, density = ring.density(SIGMA_MIN, n=61)
    assert float(density.sum()) == pytest.approx(1)
    total = 0.15**2 + SIGMA_MIN**2
    angles = torch.arange(720, dtype=torch.float64) * (2 * math.pi / 720)
    circle = torch.polar(torch.ones_like(angles), angles)
    expected = torch.exp(-(grid[..., None] - circle).abs().square() / (2 * total)).mean(-1)
    expected = expected * torch.exp(-(grid - 0.8).abs().square() / (2 * 0.6**2))
    if ring.posterior.terms:
        expected = expected * torch.exp(-(grid - (0.2 + 0.9j)).abs().square() / (2 * 0.5**2))
    assert torch.allclose(density, expected / expected.sum(), rtol=1e-8, atol=1e-15)
    # What the square leaves out: its rim is 1 from the circle, 6 standard deviations of the prior.
    rim = torch.cat([density[0], density[-1], density[:, 0], density[:, -1]])
    assert float(rim.max()) < 1e-6 * float(density.max())


def test_exact_samples_of_a_ring(ring, generator):
    n = 20_000
    x = ring.exact_samples(n, SIGMA_MIN, generator).flatten()
    grid, density = ring.density(SIGMA_MIN)
    for statistic in (lambda z: z.real, lambda z: z.imag, torch.abs, lambda z: z.real * z.imag):
        expected = float((density * statistic(grid)).sum())
        deviation = math.sqrt(float((density * statistic(grid) ** 2).sum()) - expected**2)
        assert float(statistic(x).mean()) == pytest.approx(expected, abs=5 * deviation / math.sqrt(n))
    assert len(x.real.unique()) == n, "drawn within cells, not at their centres"


def test_defaults_of_an_operator(generator):
    matrix = white(generator, 7, 20) / 20
    operator = MatrixOperator(matrix, (4, 5))
    x, y = white(generator, 3, 4, 5), white(generator, 7)
    assert torch.allclose(operator.normal(x).flatten(1), x.flatten(1) @ (matrix.mH @ matrix).T, atol=1e-12)
    assert torch.allclose(operator.residual(x, y), y - x.flatten(1) @ matrix.T, atol=1e-12)
    circulant = operator.circulant()
    assert circulant.shape == (4, 5)
    assert circulant.dtype == torch.float64
    # One probe of real unit normals: u^T G u / u^T u, G the real part of A^H A. About its mean tr(G)/p it has variance
    # 2 sum (g_i - mean)^2 / (p (p + 2)), g_i the eigenvalues of G.
    eigenvalues = torch.linalg.eigvalsh((matrix.mH @ matrix).real)
    deviation = math.sqrt(2 * float((eigenvalues - eigenvalues.mean()).square().sum()) / (20 * 22))
    assert float(circulant[0, 0]) == pytest.approx(float(eigenvalues.mean()), abs=5 * deviation)
    assert circulant.std() == 0
    for method in ("forward", "adjoint"):
        with pytest.raises(NotImplementedError):
            getattr(LinearOperator(), method)(x)


def test_line_mask_holds_every_so_many_columns_and_the_centre():
    mask = line_mask((3, 12), 4, 3)
    assert mask.shape == (3, 12)
    assert mask[0].nonzero().flatten().tolist() == [0, 4, 5, 6, 7, 8]
    assert bool((mask == mask[0]).all())
