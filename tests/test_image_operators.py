"""Operators outside MRI: the algebra that samplers rely on, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mri_posterior.exact import dense, forward_matrix, white
from mri_posterior.image_operators import Blur, Downsample, PixelMask
from mri_posterior.operator import LinearOperator


def pixel_mask(shape: tuple[int, int], dtype: torch.dtype) -> PixelMask:
    return PixelMask(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5, dtype)


OPERATORS = {
    "mask": lambda dtype: pixel_mask((8, 6), dtype),
    "mask, odd": lambda dtype: pixel_mask((7, 5), dtype),
    "blur": lambda dtype: Blur((8, 10), 1.3, 5, dtype),
    "blur, odd": lambda dtype: Blur((9, 7), 0.8, 7, dtype),
    "blur, even by odd": lambda dtype: Blur((6, 7), 2.0, 3, dtype),
    "downsample": lambda dtype: Downsample((8, 12), 4, dtype),
    "downsample, odd": lambda dtype: Downsample((9, 15), 3, dtype),
    "downsample by 1": lambda dtype: Downsample((4, 5), 1, dtype),
}


@pytest.fixture(params=[torch.complex64, torch.complex128], ids=["single", "double"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=OPERATORS)
def operator(request, dtype) -> LinearOperator:
    return OPERATORS[request.param](dtype)


def rounding(dtype: torch.dtype) -> float:
    """Relative error of sums over at most 144 numbers of order 1, one unit in the last place each."""
    return 144 * torch.finfo(dtype).eps


def test_adjoint_normal_residual_shapes_and_precision(operator, dtype, generator):
    x = white(generator, 2, 3, *operator.shape, dtype=dtype)
    y = white(generator, 2, 3, *operator.data_shape, dtype=dtype)
    seen, back = operator.forward(x), operator.adjoint(y)
    assert (seen.shape, back.shape) == (y.shape, x.shape)
    assert (seen.dtype, back.dtype, operator.dtype, operator.circulant().dtype) == (dtype, dtype, dtype, x.real.dtype)
    # <A x, y> = <x, A^H y>
    assert abs((seen.conj() * y).sum() - (x.conj() * back).sum()) < 10 * rounding(dtype) * x.numel() ** 0.5
    assert torch.allclose(operator.normal(x), operator.adjoint(seen), atol=rounding(dtype))
    data = y[0, 0]
    expected = data - seen
    if isinstance(operator, PixelMask):
        expected = torch.where(operator.mask, expected, 0)
    assert torch.allclose(operator.residual(x, data), expected, atol=rounding(dtype))


def test_norm_is_at_most_1(operator, dtype):
    norm = float(torch.linalg.matrix_norm(forward_matrix(operator), ord=2))
    # All three leave some image as it is: a seen pixel, a constant.
    assert norm == pytest.approx(1, abs=rounding(dtype))


@pytest.mark.parametrize("name", [name for name in OPERATORS if not name.startswith("mask")])
def test_circulant_is_the_fourier_diagonal_of_the_normal_operator(name):
    operator = OPERATORS[name](torch.complex128)
    fourier = dense(lambda x: torch.fft.fft2(x, norm="ortho"), operator.shape)
    matrix = fourier @ dense(operator.normal, operator.shape) @ fourier.mH
    assert torch.allclose(operator.circulant().flatten(), torch.diagonal(matrix).real, atol=1e-12)
    if isinstance(operator, Blur):
        assert torch.allclose(matrix, torch.diag(torch.diagonal(matrix)), atol=1e-12), "a blur is circulant"


def test_circulant_of_a_pixel_mask_is_near_the_share_of_seen_pixels():
    """The default of `LinearOperator`: one probe of ``p`` real unit normals, of which a share ``q`` is seen.

    Standard deviation of the ratio of seen to all energy: ``sqrt(2 q (1 - q) / p)``.
    """
    operator = PixelMask(torch.rand(64, 48, generator=torch.Generator().manual_seed(1)) < 0.3)
    share = float(operator.mask.float().mean())
    deviation = (2 * share * (1 - share) / operator.mask.numel()) ** 0.5
    circulant = operator.circulant()
    assert circulant.shape == (64, 48)
    assert circulant.std() == 0
    assert float(circulant[0, 0]) == pytest.approx(share, abs=5 * deviation)
    assert torch.equal(circulant, operator.circulant())


def test_a_blur_is_the_convolution_with_its_kernel(generator):
    """Away from circular wrapping, against torch's own convolution with the kernel written out."""
    std, size = 1.1, 5
    x = white(generator, 1, 12, 11)
    line = torch.exp(-(torch.arange(-2, 3, dtype=torch.float64) ** 2) / (2 * std**2))
    kernel = (line[:, None] * line / line.sum() ** 2).to(torch.complex128)
    expected = functional.conv2d(functional.pad(x[:, None], (2, 2, 2, 2), mode="circular"), kernel[None, None])[:, 0]
    assert torch.allclose(Blur((12, 11), std, size, torch.complex128).forward(x), expected, atol=1e-12)


def test_downsampling_averages_blocks(generator):
    x = white(generator, 2, 6, 9)
    operator = Downsample((6, 9), 3, torch.complex128)
    means = functional.avg_pool2d(x.real, 3) + 1j * functional.avg_pool2d(x.imag, 3)
    assert torch.allclose(operator.forward(x), 3 * means, atol=1e-12)
    y = white(generator, 2, 3)
    assert torch.allclose(operator.forward(operator.adjoint(y)), y, atol=1e-12), "A A^H = I"


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="expected"):
        PixelMask(torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="odd"):
        Blur((8, 8), 1.0, 4)
    with pytest.raises(ValueError, match="at most 8"):
        Blur((8, 9), 1.0, 9)
    with pytest.raises(ValueError, match="positive"):
        Blur((8, 9), 0.0, 3)
    with pytest.raises(ValueError, match="multiples of 3"):
        Downsample((9, 8), 3)
    with pytest.raises(ValueError, match="at least 1"):
        Downsample((8, 8), 0)
