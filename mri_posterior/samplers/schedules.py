"""Noise levels: of the reverse diffusion, and of the annealed measurements."""

from __future__ import annotations

import math


def diffusion_levels(sigma_max: float, sigma_min: float, steps: int) -> list[float]:
    """`steps` + 1 geometric noise levels from `sigma_max` down to `sigma_min`."""
    if sigma_max <= sigma_min:
        return [sigma_min]
    return [sigma_max * (sigma_min / sigma_max) ** (i / steps) for i in range(steps + 1)]


def annealing_levels(eta_max: float, eta: float, levels: int) -> list[float]:
    """The paper's admissible schedule ``eta_1 > … > eta_N = eta`` of measurement noise (Section 3).

    The precision ``1/eta_i^2`` at most doubles from level to level while the measurement is weak and grows
    by equal amounts once it is strong; the amount is chosen so that `levels` levels suffice. Where even
    doubling would take more levels than that, the ratio is constant and larger, outside of what the theorem covers.
    """
    first, last = 1 / eta_max**2, 1 / eta**2
    if last <= first or levels == 1:
        return [eta]
    octaves = math.log2(last / first)
    if octaves >= levels - 1:
        ratio = (last / first) ** (1 / (levels - 1))
        return [(first * ratio**i) ** -0.5 for i in range(levels - 1)] + [eta]

    def climb(amount: float) -> list[float]:
        """Precisions from `first` to `last`, doubling or adding `amount`, whichever is less."""
        precisions = [first]
        while precisions[-1] < last and len(precisions) <= levels:
            precisions.append(precisions[-1] + min(precisions[-1], amount))
        return precisions

    low, high = 0.0, last
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if len(climb(middle)) > levels else (low, middle)
    return [precision**-0.5 for precision in climb(high)[:-1]] + [eta]
