"""Muon: orthogonal steps for kernels, Adam's own for the rest, and a state that resumes."""

from __future__ import annotations

import copy

import pytest
import torch

from mri_posterior.optimiser import KERNEL_RATE, Muon, orthogonalised


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(2, 16, 3), torch.nn.Conv2d(16, 24, 3), torch.nn.Conv2d(24, 2, 3))


def backward(network: torch.nn.Module, generator: torch.Generator) -> None:
    network.zero_grad()
    network(torch.randn(1, 2, 12, 12, generator=generator)).square().mean().backward()


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16)])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_orthogonalised_keeps_directions_and_equalises_their_sizes(shape, size, generator):
    """Five rounds of the quintic bring singular values between 0.01 and 1, relative to the norm, to 0.67-1.21."""
    matrix = size * torch.randn(*shape, generator=generator)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalised(matrix) @ vh.T
    seen = s > 0.02 * s.norm()
    assert seen.sum() >= 6
    values = inside.diagonal()[seen]
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    # Rounding of single precision, amplified by (3.4)^5 = 480 at most.
    assert float((inside - torch.diag(inside.diagonal())).abs().max()) < 480 * 30 * 2**-24


def test_all_but_kernels_are_adams(network, generator):
    twin = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]
    ours, reference = Muon(network, 1e-3), torch.optim.Adam(twin, lr=1e-3, betas=(0.9, 0.99))
    for _ in range(4):
        backward(network, generator)
        for other, parameter in zip(twin, network.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        ours.step()
        reference.step()
    same = [torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(network.parameters(), twin, strict=True)]
    assert same == [True, True, False, True, True, True], "the kernel of the middle layer alone is Muon's"


def test_a_kernel_moves_by_its_rate_in_every_direction(network, generator):
    before = network[1].weight.detach().clone()
    backward(network, generator)
    Muon(network, 1e-3).step()
    moved = torch.linalg.svdvals((before - network[1].weight.detach()).reshape(24, -1))
    assert float(moved.max()) < 1.3 * KERNEL_RATE * 1e-3
    assert float(moved.median()) > 0.6 * KERNEL_RATE * 1e-3


def test_state_resumes_exactly(network, generator):
    optimiser = Muon(network, 1e-3)
    for _ in range(2):
        backward(network, generator)
        optimiser.step()
    state, weights = copy.deepcopy(optimiser.state_dict()), copy.deepcopy(network.state_dict())
    place = generator.get_state()
    backward(network, generator)
    optimiser.step()
    unbroken = [p.detach().clone() for p in network.parameters()]

    network.load_state_dict(weights)
    generator.set_state(place)
    resumed = Muon(network, 1e-3)
    resumed.load_state_dict(state)
    backward(network, generator)
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), unbroken, strict=True))
