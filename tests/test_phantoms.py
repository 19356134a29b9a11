from __future__ import annotations

import sys

import numpy as np
import pytest

from mri_posterior.errors import UserError
from mri_posterior.phantoms import brain_slices, knee_phantom, smooth_phase


def knee(seed: int, shape: tuple[int, int] = (160, 160)) -> np.ndarray:
    return knee_phantom(shape, np.random.default_rng(seed))


def test_knee_depends_on_the_generator_alone():
    assert np.array_equal(knee(3), knee(3))
    for a, b in ((knee(3), knee(4)), (knee(4), knee(5))):
        assert np.abs(a - b).mean() > 0.05


@pytest.mark.parametrize("shape", [(160, 160), (96, 128), (131, 77)])
def test_knee_has_the_shape_and_range_it_promises(shape):
    images = np.stack([knee(seed, shape) for seed in range(12)])
    assert images.shape == (12, *shape)
    assert images.dtype == np.float32
    assert np.isfinite(images).all()
    assert images.min() == 0
    assert 0.5 < np.percentile(images, 99) < 1.25
    assert images.max() <= 1.25


def test_knee_is_a_leg_from_top_to_bottom_in_exact_air():
    for seed in range(12):
        occupied = knee(seed) > 0
        assert occupied[:, 80].all()  # the leg leaves the frame at both ends
        assert 0.05 < np.mean(~occupied) < 0.5
        widths = occupied.sum(axis=1)
        assert widths.min() > 80  # mm


def test_knees_come_with_bright_and_with_suppressed_fat():
    # Well below the joint, the middle of the leg is the marrow of the tibia.
    marrow = [np.median(knee(seed)[115:125, 75:85]) for seed in range(30)]
    assert sum(m < 0.35 for m in marrow) > 5
    assert sum(m > 0.5 for m in marrow) > 5


def test_smooth_phase_has_unit_modulus_and_the_strength_asked_for():
    phase = smooth_phase((60, 44), np.random.default_rng(1), 0.3)
    assert phase.dtype == np.complex64
    assert np.abs(phase) == pytest.approx(1, abs=1e-6)
    assert np.sqrt(np.mean(np.angle(phase) ** 2)) == pytest.approx(0.3, rel=1e-4)
    # Three half-waves of at most a few times the strength: neighbours hardly differ.
    assert np.abs(np.diff(np.angle(phase), axis=0)).max() < 0.1
    assert np.array_equal(phase, smooth_phase((60, 44), np.random.default_rng(1), 0.3))


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    pytest.importorskip("nilearn", reason="the brain template comes with nilearn (extra: samples)")
    return brain_slices((120, 96), (-30.0, 10.0, 50.0))


def test_brain_has_the_shape_and_range_it_promises(brain):
    assert brain.shape == (3, 120, 96)
    assert brain.dtype == np.float32
    assert brain.min() == 0
    assert np.percentile(brain, 99) == pytest.approx(1, rel=1e-5)


def test_brain_is_the_right_way_round(brain):
    low, middle, high = brain
    # At the height of the cerebellum there is little brain in front, where the eyes are.
    assert low[:50].sum() < 0.5 * low[70:].sum()
    # The template is symmetric about its midline, column 48 of 96 after centring 99 columns (49 -> 48).
    assert np.abs(middle[:, 1:48] - middle[:, 95:48:-1]).mean() < 0.02
    assert (high > 0).sum() < (middle > 0).sum()


def test_brain_is_padded_and_cropped_about_its_centre(brain):
    large = brain_slices((150, 131), (-30.0, 10.0, 50.0))
    small = large[:, 75 - 60 : 75 + 60, 65 - 48 : 65 + 48]
    ratio = small[brain > 0] / brain[brain > 0]
    assert np.ptp(ratio) < 1e-5  # only the 99th percentile, which counts air too, differs
    assert brain_slices((61, 40), (10.0,)).shape == (1, 61, 40)


def test_brain_tells_of_heights_outside_of_the_template(brain):
    with pytest.raises(UserError, match=r"\[200\.0\].*-72 to 116"):
        brain_slices((120, 96), (0.0, 200.0))


def test_brain_without_nilearn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn.datasets", None)
    with pytest.raises(UserError, match=r"mri-posterior\[samples\]"):
        brain_slices((120, 96), (0.0,))


def test_brain_reads_only_what_the_package_ships(brain, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("network access")

    monkeypatch.setattr(socket, "socket", refuse)
    brain_slices((120, 96), (0.0,))
