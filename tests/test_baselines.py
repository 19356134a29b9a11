from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mri_posterior.baselines import BASELINES, cg_sense, l1_wavelet, tv, zero_filled
from mri_posterior.errors import UserError
from mri_posterior.masks import MaskConfig, make_mask
from mri_posterior.slices import MultiCoilSlice

IXI = Path(__file__).parents[2] / "shared" / "data" / "ixi_brain_t1_2mm.h5"


def _fft(x, inverse=False):
    transform = np.fft.ifft2 if inverse else np.fft.fft2
    return np.fft.fftshift(transform(np.fft.ifftshift(x, axes=(-2, -1)), norm="ortho"), axes=(-2, -1))


def _measure(image, mask, noise_std, n_coils=4, seed=0) -> MultiCoilSlice:
    import sigpy.mri as mr

    maps = mr.birdcage_maps((n_coils, *image.shape))
    maps /= np.sqrt((np.abs(maps) ** 2).sum(axis=0))
    random = np.random.default_rng(seed)
    noise = random.normal(size=maps.shape) + 1j * random.normal(size=maps.shape)
    kspace = mask * (_fft(maps * image) + noise_std * noise)
    return MultiCoilSlice(
        kspace=torch.from_numpy(kspace.astype(np.complex64)),
        mask=torch.from_numpy(mask),
        maps=torch.from_numpy(maps.astype(np.complex64)),
        noise_std=noise_std,
        scale=1.0,
        weight=torch.ones(image.shape, dtype=torch.complex64),
    )


def _phantom(shape):
    import sigpy as sp

    image = np.abs(sp.shepp_logan(shape))
    return image / np.percentile(image, 99)


def _psnr(image, reconstruction):
    return 10 * np.log10(image.max() ** 2 / np.mean((image - np.abs(reconstruction)) ** 2))


@pytest.fixture(scope="module")
def problem():
    image = _phantom((48, 40))
    mask = make_mask(MaskConfig("equispaced", 3, center_fraction=0.15), image.shape, "a.h5")
    return image, _measure(image, mask, 0.02)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_repeat_and_leave_global_random_numbers_alone(problem, name):
    _, slice_ = problem
    state = np.random.get_state()
    first = BASELINES[name](slice_)
    np.random.set_state(state)
    np.random.normal(size=17)  # other global random numbers must not matter
    before = np.random.get_state()[1].copy(), np.random.get_state()[2]
    second = BASELINES[name](slice_)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert np.random.get_state()[2] == before[1]
    assert first.shape == (48, 40)
    assert first.dtype == np.complex64


@pytest.mark.parametrize(("name", "gain"), [("cg_sense", 2), ("l1_wavelet", 3), ("tv", 6)])
def test_baselines_improve_on_zero_filling(problem, name, gain):
    image, slice_ = problem
    assert _psnr(image, BASELINES[name](slice_)) > _psnr(image, zero_filled(slice_)) + gain


def test_zero_filled_is_the_adjoint(problem):
    _, slice_ = problem
    maps, kspace = slice_.maps.numpy(), slice_.kspace.numpy()
    np.testing.assert_allclose(zero_filled(slice_), (maps.conj() * _fft(kspace, inverse=True)).sum(axis=0), atol=1e-5)


@pytest.mark.parametrize("shape", [(10, 8), (9, 7)])
def test_cg_sense_is_the_ridge_solution(shape):
    mask = np.random.default_rng(1).uniform(size=shape) < 0.5
    slice_ = _measure(_phantom((32, 32))[: shape[0], : shape[1]] + 1, mask, 0.05)
    maps, n = slice_.maps.numpy().astype(complex), shape[0] * shape[1]
    columns = [(mask * _fft(maps * unit.reshape(shape))).ravel() for unit in np.eye(n)]
    matrix = np.stack(columns, axis=1)
    expected = np.linalg.solve(
        matrix.conj().T @ matrix + 0.1 * np.eye(n), matrix.conj().T @ slice_.kspace.numpy().ravel()
    )
    np.testing.assert_allclose(cg_sense(slice_, 0.1).ravel(), expected, atol=1e-4)


def _objective(slice_, image, strength, transform):
    residual = slice_.mask.numpy() * _fft(slice_.maps.numpy() * image) - slice_.kspace.numpy()
    return 0.5 * (np.abs(residual) ** 2).sum() + strength * np.abs(transform(image)).sum()


@pytest.mark.parametrize("name", ["l1_wavelet", "tv"])
def test_sparse_baselines_reach_the_minimum(problem, name):
    import sigpy as sp
    import sigpy.mri as mr

    _, slice_ = problem
    strength, shape = 0.005, tuple(slice_.mask.shape)
    transform = sp.linop.Wavelet(shape, wave_name="db4") if name == "l1_wavelet" else sp.linop.FiniteDifference(shape)
    app = mr.app.L1WaveletRecon if name == "l1_wavelet" else mr.app.TotalVariationRecon
    state = np.random.get_state()
    long = app(
        slice_.kspace.numpy(),
        slice_.maps.numpy(),
        strength,
        weights=slice_.mask.numpy().astype(np.float32),
        max_iter=1500,
        show_pbar=False,
    ).run()
    np.random.set_state(state)
    ours, theirs = (_objective(slice_, x, strength, transform) for x in (BASELINES[name](slice_, strength), long))
    assert ours < theirs * 1.002


def test_strength_smooths(problem):
    _, slice_ = problem
    for function in (l1_wavelet, tv):
        rough, smooth = (np.abs(np.diff(function(slice_, s))).sum() for s in (1e-4, 0.1))
        assert smooth < 0.8 * rough


def test_a_noiseless_slice_is_no_special_case(problem):
    image, slice_ = problem
    clean = _measure(image, np.ones(image.shape, dtype=bool), 0.0)
    for function in BASELINES.values():
        assert _psnr(image, function(clean)) > 40
    assert replace(slice_, noise_std=0.0).noise_std == 0


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_bad_strength_is_refused(problem, strength):
    for function in BASELINES.values():
        with pytest.raises(UserError, match="strength"):
            function(problem[1], strength)


@pytest.mark.parametrize(("kind", "floors"), [("equispaced", (25.5, 27, 28)), ("poisson", (24, 24.5, 25.5))])
def test_default_strengths_on_a_real_brain(kind, floors):
    if not IXI.exists():
        pytest.skip("../shared/data is not here")
    with h5py.File(IXI) as file:
        validation = np.flatnonzero(file["split"][:].astype(str)[file["subject_index"][:]] == "val")
        image = file["images"][validation[20]].astype(np.float64)
    image /= np.percentile(image, 99)
    config = MaskConfig(kind, 4 if kind == "equispaced" else 8, center_fraction=8 / 90, calib=(16, 16))
    slice_ = _measure(image, make_mask(config, image.shape, "a.h5"), 0.01, n_coils=8)
    scores = [_psnr(image, function(slice_)) for function in (cg_sense, l1_wavelet, tv)]
    assert all(score > floor for score, floor in zip(scores, floors, strict=True)), scores
