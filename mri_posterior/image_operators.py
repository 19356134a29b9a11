"""Measurements of images outside MRI: inpainting, deblurring, super-resolution (the tasks of the paper's Figure 4).

All have ``|A| <= 1`` and serve any sampler in place of `mri_posterior.operator.SenseOperator`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Complex, Float

from mri_posterior.operator import LinearOperator


class PixelMask(LinearOperator):
    """Inpainting: only the pixels in `mask` are seen.

    Raises
    ------
    ValueError: `mask` is not ``[H, W]``.
    """

    def __init__(self, mask: Bool[torch.Tensor, "H W"], dtype: torch.dtype = torch.complex64):
        if mask.ndim != 2:
            raise ValueError(f"mask {tuple(mask.shape)}: expected [H, W]")
        self.mask = mask
        self.shape = self.data_shape = (mask.shape[0], mask.shape[1])
        self.dtype = dtype
        self.device = mask.device

    def forward(self, image: Complex[torch.Tensor, "*batch H W"]) -> Complex[torch.Tensor, "*batch H W"]:
        return self.mask * image

    adjoint = normal = forward

    def residual(
        self, image: Complex[torch.Tensor, "*batch H W"], data: Complex[torch.Tensor, "H W"]
    ) -> Complex[torch.Tensor, "*batch H W"]:
        return self.mask * (data - image)


class Blur(LinearOperator):
    """Deblurring: circular convolution with a Gaussian of standard deviation `std` pixels, cut to `size` x `size`.

    Raises
    ------
    ValueError: `size` is even or exceeds the image, or `std` is not positive.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        std: float,
        size: int,
        dtype: torch.dtype = torch.complex64,
        device: torch.device | str = "cpu",
    ):
        if size % 2 == 0 or size > min(shape):
            raise ValueError(f"size {size}: it must be odd and at most {min(shape)}")
        if not std > 0:
            raise ValueError(f"std {std}: it must be positive")
        self.shape = self.data_shape = shape
        self.dtype = dtype
        self.device = torch.device(device)
        offsets = torch.arange(size, dtype=torch.float64) - size // 2
        line = torch.exp(-(offsets**2) / (2 * std**2))
        kernel = torch.zeros(shape, dtype=torch.float64)
        kernel[:size, :size] = line[:, None] * line / line.sum() ** 2
        kernel = kernel.roll((-(size // 2), -(size // 2)), (0, 1))
        self._transfer = torch.fft.fft2(kernel).real.to(self.device, torch.empty((), dtype=dtype).real.dtype)

    def forward(self, image: Complex[torch.Tensor, "*batch H W"]) -> Complex[torch.Tensor, "*batch H W"]:
        return torch.fft.ifft2(self._transfer * torch.fft.fft2(image))

    adjoint = forward  # the kernel is real and symmetric

    def circulant(self) -> Float[torch.Tensor, "H W"]:
        return self._transfer.square()


class Downsample(LinearOperator):
    """Super-resolution: means over `factor` x `factor` blocks, times `factor` so that ``A A^H = I``.

    Scale data and noise level accordingly: ``y = factor * (block means)``.

    Raises
    ------
    ValueError: `factor` is not positive, or the image's sides are not multiples of it.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        factor: int,
        dtype: torch.dtype = torch.complex64,
        device: torch.device | str = "cpu",
    ):
        if factor < 1:
            raise ValueError(f"factor {factor}: it must be at least 1")
        if shape[0] % factor or shape[1] % factor:
            raise ValueError(f"shape {shape}: sides must be multiples of {factor}")
        self.shape = shape
        self.factor = factor
        self.data_shape = (shape[0] // factor, shape[1] // factor)
        self.dtype = dtype
        self.device = torch.device(device)

    def forward(self, image: Complex[torch.Tensor, "*batch H W"]) -> Complex[torch.Tensor, "*batch h w"]:
        f = self.factor
        return image.unflatten(-1, (-1, f)).unflatten(-3, (-1, f)).sum(dim=(-3, -1)) / f

    def adjoint(self, data: Complex[torch.Tensor, "*batch h w"]) -> Complex[torch.Tensor, "*batch H W"]:
        f = self.factor
        return data.repeat_interleave(f, dim=-1).repeat_interleave(f, dim=-2) / f

    def circulant(self) -> Float[torch.Tensor, "H W"]:
        """``A^H A`` is a block mean followed by a sampling grid: what survives of each frequency is its gain squared
        over ``factor^2`` aliases.
        """
        gains = [_block_gain(n, self.factor) for n in self.shape]
        return (gains[0][:, None] * gains[1]).to(self.device, torch.empty((), dtype=self.dtype).real.dtype)


def _block_gain(n: int, factor: int) -> Float[torch.Tensor, n]:
    """Squared transfer function of a mean over `factor` neighbours, averaged over its aliases."""
    frequency = torch.arange(n, dtype=torch.float64) / n * math.pi
    ratio = torch.sin(factor * frequency) / (factor * torch.sin(frequency))
    return torch.nan_to_num(ratio, nan=1.0).square()
