"""Linear operators: what samplers ask of one, and the multi-coil Fourier operator ``A = P F C`` of MRI.

In torch, batched and on any device. sigpy's ``Sense`` linop is the reference (`mri_posterior.coils.sense_linop`);
a test holds the two equal. Operators of other imaging tasks are in `mri_posterior.image_operators`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Complex, Float

_IMAGE = (-2, -1)


def fft2c(image: Complex[torch.Tensor, "*batch H W"]) -> Complex[torch.Tensor, "*batch H W"]:
    """Centred orthonormal 2-D FFT, fastMRI's and sigpy's convention."""
    return torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(image, dim=_IMAGE), norm="ortho"), dim=_IMAGE)


def ifft2c(kspace: Complex[torch.Tensor, "*batch H W"]) -> Complex[torch.Tensor, "*batch H W"]:
    """Inverse, and adjoint, of `fft2c`."""
    return torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(kspace, dim=_IMAGE), norm="ortho"), dim=_IMAGE)


class LinearOperator:
    """A measurement ``y = A x`` of complex images, as samplers use it. For one of your own, write the first six.

    Attributes
    ----------
    shape: rows and columns of the image.
    data_shape: of one measurement.
    dtype, device: of images and measurements; complex.

    ``|A| <= 1`` is asked for: unpreconditioned step sizes rely on it. Scale data and noise level with the operator.
    """

    shape: tuple[int, int]
    data_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def forward(self, image: Complex[torch.Tensor, "*batch H W"]) -> Complex[torch.Tensor, "*batch *data"]:
        """``A x``."""
        raise NotImplementedError

    def adjoint(self, data: Complex[torch.Tensor, "*batch *data"]) -> Complex[torch.Tensor, "*batch H W"]:
        """``A^H y``."""
        raise NotImplementedError

    def normal(self, image: Complex[torch.Tensor, "*batch H W"]) -> Complex[torch.Tensor, "*batch H W"]:
        """``A^H A x``."""
        return self.adjoint(self.forward(image))

    def residual(
        self, image: Complex[torch.Tensor, "*batch H W"], data: Complex[torch.Tensor, "*data"]
    ) -> Complex[torch.Tensor, "*batch *data"]:
        """``y - A x``, zero where nothing was measured."""
        return data - self.forward(image)

    def circulant(self) -> Float[torch.Tensor, "H W"]:
        """An approximation of ``A^H A`` that is diagonal in Fourier space (unshifted order), to precondition CG.

        The default is the best multiple of the identity, from one fixed probe.
        """
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(1, *self.shape, generator=generator).to(self.device, self.dtype)
        share = self.forward(probe).abs().square().sum() / probe.abs().square().sum()
        return share * torch.ones(self.shape, device=self.device, dtype=probe.real.dtype)


class SenseOperator(LinearOperator):
    """What the scanner measures of an image: ``y = mask * F(maps * x)`` (SENSE, Pruessmann et al. 1999).

    Maps with ``sum_c |maps_c|^2 <= 1`` everywhere give ``|A| <= 1``, which step sizes rely on.

    Parameters
    ----------
    maps: coil sensitivities, complex64 or complex128; their dtype and device are the operator's.
    mask: sampled points of the centred k-space.

    Raises
    ------
    ValueError: shapes that do not belong together.
    """

    def __init__(self, maps: Complex[torch.Tensor, "coils H W"], mask: Bool[torch.Tensor, "H W"]):
        if maps.ndim != 3 or mask.shape != maps.shape[1:]:
            raise ValueError(
                f"maps {tuple(maps.shape)} and mask {tuple(mask.shape)}: expected [coils, H, W] and [H, W]"
            )
        self.maps = maps
        self.mask = mask.to(maps.device)
        self.shape = (maps.shape[1], maps.shape[2])
        self.data_shape = tuple(maps.shape)
        self.dtype = maps.dtype
        self.device = maps.device
        # In A^H A the image shift commutes with the circular convolution, so only the mask needs shifting, once.
        self._shifted_mask = torch.fft.ifftshift(self.mask).to(maps.real.dtype)
        # With whole lines sampled the FFT along the readout cancels its inverse.
        self._axes = (-1,) if bool((self.mask == self.mask[:1]).all()) else _IMAGE
        # One coil at a time stays within a processor's cache: about twice as fast, and in one coil's memory.
        self._coil_by_coil = maps.device.type == "cpu"

    def to(self, device: torch.device | str) -> SenseOperator:
        return SenseOperator(self.maps.to(device), self.mask.to(device))

    def forward(self, image: Complex[torch.Tensor, "*batch H W"]) -> Complex[torch.Tensor, "*batch coils H W"]:
        """``A x``: zero where nothing was sampled."""
        return self.mask * fft2c(self.maps * image.unsqueeze(-3))

    def adjoint(self, kspace: Complex[torch.Tensor, "*batch coils H W"]) -> Complex[torch.Tensor, "*batch H W"]:
        """``A^H y``: the coil-combined zero-filled image when `kspace` is measured."""
        if not self._coil_by_coil:
            return (self.maps.conj() * ifft2c(self.mask * kspace)).sum(dim=-3)
        total = 0.0
        for coil, data in zip(self.maps, kspace.unbind(dim=-3), strict=True):
            total = total + coil.conj() * ifft2c(self.mask * data)
        return total

    def residual(
        self, image: Complex[torch.Tensor, "*batch H W"], data: Complex[torch.Tensor, "coils H W"]
    ) -> Complex[torch.Tensor, "*batch coils H W"]:
        return self.mask * (data - fft2c(self.maps * image.unsqueeze(-3)))

    def normal(self, image: Complex[torch.Tensor, "*batch H W"]) -> Complex[torch.Tensor, "*batch H W"]:
        """``A^H A x`` without shift copies, and with FFTs along one axis where the mask allows."""
        if not self._coil_by_coil:
            spectrum = torch.fft.fftn(self.maps * image.unsqueeze(-3), dim=self._axes, norm="ortho")
            coils = torch.fft.ifftn(spectrum.mul_(self._shifted_mask), dim=self._axes, norm="ortho")
            return torch.einsum("chw,...chw->...hw", self.maps.conj(), coils)
        total = torch.zeros_like(image, dtype=torch.result_type(self.maps, image))
        for coil in self.maps:
            spectrum = torch.fft.fftn(coil * image, dim=self._axes, norm="ortho")
            seen = torch.fft.ifftn(spectrum.mul_(self._shifted_mask), dim=self._axes, norm="ortho")
            total = total.addcmul_(coil.conj(), seen)
        return total

    def circulant(self) -> Float[torch.Tensor, "H W"]:
        """Diagonal of ``F A^H A F^H`` in unshifted FFT order: how well each spatial frequency is measured, 0 to 1.

        The best circulant approximation of ``A^H A`` (T. Chan 1988): the mask smeared by the coils' energy
        spectrum. It preconditions conjugate gradients.
        """
        energy = torch.fft.fft2(self.maps, norm="ortho").abs().square().sum(dim=0) / self.mask.numel()
        correlation = torch.fft.ifft2(torch.fft.fft2(self._shifted_mask) * torch.fft.fft2(energy).conj())
        return correlation.real.clamp_min(0)
