"""Augmentation: each change stays within what it is meant to vary, and no image can blow up."""

from __future__ import annotations

import pytest
import torch

from mri_posterior import augmentation
from mri_posterior.augmentation import (
    dephase_some,
    frame,
    move,
    percentile,
    recolour,
    scan,
    smooth_field,
    strip_some,
    window,
)
from mri_posterior.phantoms import SAMPLE_HEIGHTS_MM, brain_slices, brain_template
from mri_posterior.training_data import template_views


@pytest.fixture
def heads():
    """Six discs of tissue, 99th percentile 1, in dark air."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 60), torch.linspace(-1, 1, 48), indexing="ij")
    radius = (rows**2 + columns**2).sqrt()
    head = torch.where(radius < 0.7, 0.6 + 0.4 * (radius < 0.4), 0.0)
    return head.expand(6, -1, -1).clone()


def test_smooth_fields_have_unit_power_and_no_high_frequencies(generator):
    field = smooth_field((4, 32, 40), generator)
    assert torch.allclose(field.square().mean((1, 2)), torch.ones(4), atol=1e-4)
    assert float(field.diff(dim=-1).abs().max()) < 0.1 * float(field.abs().max()) * 4


@pytest.mark.parametrize("crop", [(60, 48), (32, 32), (64, 40), (80, 80)])
def test_frames_and_windows_have_the_wanted_size_and_only_what_was_there(heads, crop, generator):
    for cut in (frame(heads, crop), window(heads, crop, generator)):
        assert cut.shape == (6, *crop)
        assert set(cut.unique().tolist()) <= set(heads.unique().tolist())
    whole = tuple(max(a, b) for a, b in zip(crop, (60, 48), strict=True))
    assert torch.allclose(window(heads, whole, generator).sum((1, 2)), heads.sum((1, 2)))


def test_windows_are_anywhere(generator):
    ramp = torch.arange(100.0).reshape(10, 10).expand(500, -1, -1)
    first = window(ramp, (6, 6), generator)[:, 0, 0]
    assert set(first.tolist()) == {10.0 * row + column for row in range(5) for column in range(5)}


def test_contrast_changes_but_air_stays_dark_and_the_scale_is_kept(heads, generator):
    changed = recolour(heads.repeat(20, 1, 1), generator)
    assert torch.allclose(percentile(changed), torch.ones(120, 1, 1), atol=1e-4)
    air = heads.repeat(20, 1, 1) == 0
    assert float(changed[air].abs().max()) == 0
    inner, outer = changed[:, 30, 24], changed[:, 30, 36]
    inverted = (inner < outer).float().mean()
    # A random curve turns the order of two tissues round about every other time, and RECOLOURED draws get one.
    assert 0 < float(inverted) < augmentation.RECOLOURED


def test_a_blanked_image_does_not_become_one_of_noise(generator):
    """What brain extraction leaves of a slice at the top of the head may be nothing."""
    images = 1e-4 * torch.rand(8, 32, 32, generator=generator)
    assert float(recolour(images, generator).max()) < 0.05


def test_magnified_views_are_of_the_same_object(heads, generator, monkeypatch):
    monkeypatch.setattr(augmentation, "MAGNIFIED", 1.0)
    monkeypatch.setattr(augmentation, "SHIFT", 0)
    moved = move(heads.repeat(20, 1, 1), generator)
    share = (moved > 0.3).float().mean((1, 2)) / float((heads[0] > 0.3).float().mean())
    assert float(share.max()) > 1.3
    assert float(share.max()) < augmentation.FINEST**2 + 0.1
    assert float(moved.max()) < 1.2  # bicubic overshoot is 0.07 of a step each way


def test_stripping_takes_the_rim(heads, generator, monkeypatch):
    monkeypatch.setattr(augmentation, "STRIPPED", 1.0)
    stripped = strip_some(heads, generator)
    assert float(stripped[:, 30, 24].min()) == 1.0
    assert float(stripped[:, 30, 39].max()) == 0.0
    assert float(heads[:, 30, 39].min()) > 0, "the input is left alone"


def test_scans_have_the_magnitude_and_a_smooth_phase(heads, generator):
    images = scan(heads, generator, jitter=False)
    assert torch.allclose(images.abs(), heads, atol=1e-6)
    phase = images[:, 20:40, 16:32].angle()
    assert float(phase.diff(dim=-1).abs().max()) < 0.2
    assert float(phase.std()) > 0.01


def test_tissues_differ_in_phase_but_not_at_low_resolution(heads, generator, monkeypatch):
    monkeypatch.setattr(augmentation, "DEPHASED", 1.0)
    images = dephase_some(heads.repeat(8, 1, 1), generator)
    assert torch.allclose(images.abs(), heads.repeat(8, 1, 1), atol=1e-6)
    assert float((images.angle().abs() * (heads[0] > 0)).max()) > 0.1, "sharp phase stays at the borders"
    assert float(images[:, 30, 24].angle().abs().max()) < 0.05, "and none where the object is flat"
    # The mean over the image, the coarsest of all resolutions, is real.
    assert float((images.sum((1, 2)).imag / heads[0].sum()).abs().max()) < 0.05
    monkeypatch.setattr(augmentation, "DEPHASED", 0.0)
    assert torch.allclose(dephase_some(heads, generator).imag, torch.zeros(()), atol=1e-6)


def test_template_has_none_of_the_sample_s_slices(generator):
    template = brain_template()
    sample = torch.from_numpy(brain_slices((117, 99), SAMPLE_HEIGHTS_MM))
    thinned = torch.from_numpy(template[:, ::2, ::2].copy())
    thinned = thinned / percentile(thinned)
    sample = sample / percentile(sample)
    differences = (thinned[:, None] - sample[None]).square().mean((2, 3)).amin(0)
    assert float(differences.min()) > 1e-4
    views = template_views(torch.from_numpy(template), 5, (120, 90), generator)
    assert views.shape == (5, 120, 90)
    assert torch.isfinite(views).all()
    assert torch.allclose(percentile(views), torch.ones(5, 1, 1), atol=1e-4)


def test_a_view_of_next_to_nothing_is_not_scaled_up(generator):
    slices = torch.zeros(2, 60, 60)
    slices[:, 30, 30] = 1e-6  # one slice's worth of air, but for a trace
    slices[0, 20:40, 20:40] = 1.0
    views = template_views(slices, 40, (24, 24), generator)
    # Either a view holds some of the square, whose brightness is the scale, or it is as dark as the trace.
    brightest = views.amax((1, 2))
    assert float(brightest.max()) <= 1.0 / augmentation.EMPTY
    assert float(brightest.min()) < 1e-4
