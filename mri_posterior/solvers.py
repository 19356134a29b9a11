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
    go on, so a solution does not depend on its batch. Hestenes and Stiefel 1952, preconditioned.

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
    for _ in range(max_iterations):
        active = ~(_inner(residual, residual) <= goal)  # NaN stays active, so that it shows in the solution
        if not bool(active.any()):
            break
        image = matvec(direction)
        curvature = _inner(direction, image)
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
