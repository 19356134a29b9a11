"""Conjugate gradients: right answers, and no talk between the members of a batch."""

from __future__ import annotations

import torch

from mri_posterior.exact import white
from mri_posterior.solvers import conjugate_gradient


def spd(generator: torch.Generator, n: int) -> torch.Tensor:
    factor = white(generator, n, n)
    return factor @ factor.mH + torch.eye(n)


def as_map(matrix: torch.Tensor):
    return lambda x: (x.flatten(1) @ matrix.T).reshape(x.shape)


def test_solves_to_its_tolerance(generator):
    matrix, rhs = spd(generator, 24), white(generator, 3, 4, 6)
    solution = conjugate_gradient(as_map(matrix), rhs, tolerance=1e-10, max_iterations=200)
    residual = as_map(matrix)(solution) - rhs
    assert float(residual.abs().square().sum()) < 1e-18 * float(rhs.abs().square().sum())


def test_preconditioner_saves_iterations(generator):
    diagonal = torch.logspace(-4, 4, 24, dtype=torch.float64)
    rhs = white(generator, 1, 4, 6)
    matvec = lambda x: (diagonal * x.flatten(1)).reshape(x.shape)  # noqa: E731
    inverse = lambda x: (x.flatten(1) / diagonal).reshape(x.shape)  # noqa: E731
    one_step = conjugate_gradient(matvec, rhs, inverse, tolerance=1e-10, max_iterations=1)
    assert torch.allclose(matvec(one_step), rhs, atol=1e-10)


def test_a_solution_does_not_depend_on_its_batch(generator):
    """Beside an easy right-hand side that is done after a few iterations stands one that needs many."""
    matrix = spd(generator, 24)
    vectors = torch.linalg.eigh(matrix)[1]
    easy, hard = vectors[:, :4].sum(1).reshape(1, 4, 6), white(generator, 1, 4, 6)

    def solve(rhs: torch.Tensor) -> torch.Tensor:
        return conjugate_gradient(as_map(matrix), rhs, tolerance=1e-3, max_iterations=100)

    # Iterating the easy one on would move it by about 1e-3 of its size; rounding stays far below.
    assert float((solve(torch.cat([easy, hard]))[:1] - solve(easy)).abs().max()) < 1e-9


def test_nan_is_not_swallowed(generator):
    rhs = white(generator, 2, 4, 6)
    rhs[1, 0, 0] = float("nan")
    solution = conjugate_gradient(as_map(spd(generator, 24)), rhs)
    assert torch.isfinite(solution[0].abs()).all()
    assert torch.isnan(solution[1].abs()).all()


def test_zero_right_hand_side_gives_zero(generator):
    solution = conjugate_gradient(as_map(spd(generator, 24)), torch.zeros(1, 4, 6, dtype=torch.complex128))
    assert not solution.any()


def test_an_image_stays_where_the_matrix_proves_indefinite(generator):
    """One negative direction: the first image has none of it and is solved, the second stops before it would divide
    by that curvature.
    """
    diagonal = torch.linspace(1, 2, 24, dtype=torch.float64)
    diagonal[-1] = -1e-3
    rhs = white(generator, 2, 4, 6)
    rhs[0, -1, -1] = 0
    rhs[1] = 0
    rhs[1, -1, -1] = 1
    solution = conjugate_gradient(lambda x: (diagonal * x.flatten(1)).reshape(x.shape), rhs, tolerance=1e-10)
    assert torch.allclose(solution[0].flatten()[:-1], rhs[0].flatten()[:-1] / diagonal[:-1], atol=1e-8)
    assert not solution[1].any()
