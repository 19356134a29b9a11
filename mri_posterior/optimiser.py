"""Muon for convolution kernels, Adam for everything else: half the steps of Adam alone, at one tenth more per step."""

from __future__ import annotations

import torch
from jaxtyping import Float

# Newton-Schulz quintic of Jordan et al. 2024: drives singular values to about 1 (0.7 to 1.2) in five rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)
KERNEL_RATE = 20  # a kernel's rate, in learning rates: its updates have singular values of 1, not entries of 1


def orthogonalised(matrix: Float[torch.Tensor, "r c"], rounds: int = 5) -> Float[torch.Tensor, "r c"]:
    """The matrix of the same singular vectors whose singular values are all about 1, by matrix products only."""
    a, b, c = QUINTIC
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised for kernels, so that all directions of a layer are learnt equally fast.

    Kernels are the 4-D weights, seen as matrices ``[out, in * rows * columns]``; first and last layer, biases, norms
    and embeddings are Adam's, as the method's authors advise (K. Jordan et al., "Muon", 2024).

    Parameters
    ----------
    network: its parameters are divided by shape: a 4-D weight with more than 8 inputs and outputs is a kernel.
    learning_rate: of Adam; kernels move by `KERNEL_RATE` times it.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        learning_rate: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ):
        kernels = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[:2]) > 8]
        chosen = set(map(id, kernels))
        others = [p for p in network.parameters() if id(p) not in chosen]
        groups = [{"params": kernels, "kernels": True}, {"params": others, "kernels": False}]
        super().__init__(groups, {"lr": learning_rate, "momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            move = self._orthogonal_step if group["kernels"] else self._adam_step
            for parameter in group["params"]:
                if parameter.grad is not None:
                    move(parameter, self.state[parameter], group)

    def _orthogonal_step(self, kernel: torch.Tensor, state: dict, group: dict) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(kernel)
        state["momentum"].mul_(group["momentum"]).add_(kernel.grad)
        # Nesterov's look-ahead.
        update = (kernel.grad + group["momentum"] * state["momentum"]).reshape(kernel.shape[0], -1)
        size = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
        rate = KERNEL_RATE * group["lr"] * size
        kernel.sub_(orthogonalised(update).reshape(kernel.shape), alpha=rate)

    def _adam_step(self, parameter: torch.Tensor, state: dict, group: dict) -> None:
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        first, second = group["betas"]
        state["step"] += 1
        step = float(state["step"])
        state["mean"].lerp_(parameter.grad, 1 - first)
        state["square"].lerp_(parameter.grad.square(), 1 - second)
        scale = (state["square"] / (1 - second**step)).sqrt() + group["eps"]
        parameter.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - first**step))


def adam(network: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, 0.99))


OPTIMISERS = {"muon": Muon, "adam": adam}
