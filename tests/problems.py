"""Small inverse problems whose posterior is known exactly, shared by the tests of samplers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mri_posterior.operator import SenseOperator
from mri_posterior.posterior import Posterior
from mri_posterior.priors import GaussianPrior


def white(generator: torch.Generator, *shape: int, dtype=torch.complex128) -> torch.Tensor:
    """Complex white noise of level 1 per real channel."""
    real = torch.float64 if dtype == torch.complex128 else torch.float32
    return torch.view_as_complex(torch.randn(*shape, 2, generator=generator, dtype=real))


def coil_maps(n_coils: int, shape: tuple[int, int], dtype=torch.complex128) -> torch.Tensor:
    """Smooth maps around the object with smooth phase, ``sum |maps|^2 = 1``."""
    axes = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape)
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    maps = []
    for coil in range(n_coils):
        angle = 2 * math.pi * coil / n_coils
        distance = (rows - math.cos(angle)) ** 2 + (columns - math.sin(angle)) ** 2
        maps.append(torch.polar(torch.exp(-distance / 1.5), coil + 0.3 * coil * rows + columns))
    stacked = torch.stack(maps)
    return (stacked / stacked.abs().square().sum(0).sqrt()).to(dtype)


def line_mask(shape: tuple[int, int], every: int, centre: int) -> torch.Tensor:
    columns = torch.zeros(shape[1], dtype=torch.bool)
    columns[::every] = True
    columns[shape[1] // 2 - centre // 2 : shape[1] // 2 + centre - centre // 2] = True
    return columns.expand(shape).clone()


def power_law(shape: tuple[int, int], amplitude: float = 4.0, exponent: float = 1.5) -> torch.Tensor:
    """Power spectrum of natural images, unshifted FFT order."""
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) * n for n in shape)
    return amplitude / (1 + rows[:, None] ** 2 + columns[None] ** 2) ** exponent


def dense(linear, shape: tuple[int, int], dtype=torch.complex128) -> torch.Tensor:
    """The matrix of a batched linear map on images."""
    n = shape[0] * shape[1]
    basis = torch.eye(n, dtype=dtype).reshape(n, *shape)
    return linear(basis).reshape(n, -1).T


@dataclass
class GaussianProblem:
    """A stationary Gaussian prior measured by a SENSE operator, with its posterior in closed form."""

    posterior: Posterior
    spectrum: torch.Tensor
    truth: torch.Tensor

    def exact(self, sigma_min: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean ``[p]`` and covariance ``[p, p]`` (per real channel) of the target ``p_sigma_min(x) * likelihood``."""
        operator, eta = self.posterior.operator, self.posterior.noise_std
        precision = dense(lambda x: torch.fft.ifft2(torch.fft.fft2(x) / (self.spectrum + sigma_min**2)), operator.shape)
        precision = precision + dense(operator.normal, operator.shape) / eta**2
        shift = operator.adjoint(self.posterior.kspace).flatten() / eta**2
        for term in self.posterior.terms:
            precision = precision + torch.eye(len(precision)) / term.std**2
            shift = shift + term.mean.flatten() / term.std**2
        covariance = torch.linalg.inv(precision)
        return covariance @ shift, covariance


def gaussian_problem(shape, n_coils: int, every: int, centre: int, eta: float, seed: int = 0) -> GaussianProblem:
    generator = torch.Generator().manual_seed(seed)
    operator = SenseOperator(coil_maps(n_coils, shape), line_mask(shape, every, centre))
    spectrum = power_law(shape)
    truth = torch.fft.ifft2(spectrum.sqrt() * torch.fft.fft2(white(generator, *shape)))
    kspace = operator.forward(truth)
    kspace = kspace + operator.mask * eta * white(generator, *kspace.shape)
    return GaussianProblem(Posterior(GaussianPrior(spectrum=spectrum), operator, kspace, eta), spectrum, truth)
