"""Batched conjugate gradients in which the members of the batch never see one another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Complex

Image = Complex[torch.Tensor, "n H W"]


def conjugate_gradient(
    matvec: Callable[[Image], Image],
    rhs: Image,
    precondition: Callable[[Image], Image] = lambda residual: residual,
    tolerance: float = 1e-4,
    max_iterations: int = 50,
) -> Image:
    """Solve ``K x = rhs`` for Hermitian positive definite ``K``, image by image.

    Step lengths and stopping are per image: an image that has converged stays as it is while the others
    go on, so a solution does not depend on its batch. Hestenes and Stiefel 1952, preconditioned. Where ``K`` proves
    not to be positive definite, as Jacobians of networks may, an image stays as it was before (Steihaug 1983).

    Parameters
    ----------
    matvec, precondition: apply ``K`` and an approximation of its inverse.
    tolerance: stop at residual norms below `tolerance` times the norm of `rhs`.
    """
    solution = torch.zeros_like(rhs)
    residual = rhs
    preconditioned = precondition(residual)
    direction = preconditioned
    product = _inner(residual, preconditioned)
    goal = tolerance**2 * _inner(rhs, rhs)
    indefinite = torch.zeros_like(goal, dtype=torch.bool)
    for _ in range(max_iterations):
        # NaN stays active, so that it shows in the solution.
        active = ~(_inner(residual, residual) <= goal) & ~indefinite
        if not bool(active.any()):
            break
        image = matvec(direction)
        curvature = _inner(direction, image)
        indefinite = indefinite | active & (curvature <= 0)
        active = active & ~indefinite
        alpha = torch.where(active, product / curvature.clamp_min(torch.finfo(product.dtype).tiny), 0)
        solution = solution + alpha * direction
        residual = residual - alpha * image
        preconditioned = precondition(residual)
        new_product = _inner(residual, preconditioned)
        beta = torch.where(active, new_product / product.clamp_min(torch.finfo(product.dtype).tiny), 0)
        direction = preconditioned + beta * direction
        product = new_product
    return solution


def _inner(a: Image, b: Image) -> torch.Tensor:
    """Real inner product per image, ``[n, 1, 1]``."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1)).real[:, None, None]
