"""The benchmarks that judge the shipped prior: what they measure, hold out and count."""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from benchmarks import held_out_kspace, retrospective
from benchmarks.retrospective import CHAIN_MEAN, GRIDS, ONE_SAMPLE, POSTERIOR_MEAN, SETTINGS, Result, Score
from mri_posterior.calibration import Estimate
from mri_posterior.operator import SenseOperator
from mri_posterior.samplers import AnnealedLangevin


@pytest.fixture
def head():
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 120), torch.linspace(-1, 1, 90), indexing="ij")
    radius = (rows**2 + columns**2).sqrt()
    return torch.complex((radius < 0.8) * (0.6 + 0.4 * (radius < 0.5)), torch.zeros(120, 90))


def test_only_middle_slices_of_validation_subjects_are_judged(tmp_path):
    images = np.arange(12, dtype=np.uint8)[:, None, None] + np.ones((12, 8, 8), np.uint8)
    with h5py.File(tmp_path / "images.h5", "w") as file:
        file["images"] = images
        file["subject_index"] = np.repeat([2, 0, 1, 3], 3)
        file["split"] = np.array([b"val", b"train", b"train", b"val"])
    truths = retrospective.reference(tmp_path / "images.h5")
    assert truths.shape == (2, 8, 8)
    assert torch.allclose(truths.abs(), torch.ones(2, 8, 8), atol=1e-5)


def test_settings_measure_what_they_say(head):
    shares = []
    for setting in SETTINGS:
        slice_ = retrospective.measure(head, setting, 0)
        clean = SenseOperator(slice_.maps, slice_.mask).forward(head)
        noise = torch.view_as_real((slice_.kspace - clean)[:, slice_.mask])
        # Its standard deviation is known to 1/sqrt(2n).
        assert float(noise.std()) == pytest.approx(setting.noise_std, rel=5 / (2 * noise.numel()) ** 0.5)
        assert not slice_.kspace[:, ~slice_.mask].any()
        shares.append(float(slice_.mask.float().mean()))
        rows, columns = slice_.mask.shape
        assert slice_.mask[rows // 2 - 12 : rows // 2 + 12, columns // 2 - 4 : columns // 2 + 4].all()
    assert shares == pytest.approx([0.32, 0.32, 0.125, 0.125], abs=0.02)


def test_a_perfect_prior_is_scored_as_such(head, monkeypatch):
    """With a prior that knows the image, gain, SSIM and one sample are what they must be."""
    monkeypatch.setattr(retrospective, "GRIDS", {"cg_sense": (0.5, 1.0)})
    truths = torch.stack([head, head.flip(0)])
    knows = lambda x, sigma: head.expand_as(x).clone()  # noqa: E731
    sampler = AnnealedLangevin(diffusion_steps=2, guided_steps=1, levels=1, final_steps=1)
    result = retrospective.run(SETTINGS[0], truths, knows, sampler, 2)
    assert set(result.scores) == {"cg_sense", POSTERIOR_MEAN, CHAIN_MEAN, ONE_SAMPLE}
    assert result.gain[0] > 0
    assert result.mean(POSTERIOR_MEAN, "psnr") > result.mean(ONE_SAMPLE, "psnr")


def test_gain_is_over_the_best_and_ssim_over_each():
    scores = {name: [Score(20, 0.5), Score(20, 0.5)] for name in GRIDS}
    scores["tv"] = [Score(25, 0.6), Score(23, 0.9)]
    scores[POSTERIOR_MEAN] = [Score(27, 0.7), Score(29, 0.8)]
    scores |= {name: [Score(1, 0.1)] * 2 for name in (ONE_SAMPLE, CHAIN_MEAN)}
    result = Result("here", scores, Estimate(1.0, 0.1, 1.0), 1.0)
    assert result.best_baseline == "tv"
    assert result.gain == pytest.approx((4.0, 2.0))
    assert result.higher_ssim == 0.5
    assert "| here | tv | +4.00 ± 2.00 | 50% |" in retrospective.tables([result])


def test_held_out_points_are_apart_and_never_in_the_calibration_centre():
    mask = torch.rand(100, 80, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[38:62, 28:52] = True
    kept, tune, judged = held_out_kspace.split(mask, 0)
    assert torch.equal(kept | tune | judged, mask)
    assert int(kept.sum() + tune.sum() + judged.sum()) == int(mask.sum())
    assert int(tune.sum()) == int(judged.sum()) == int(mask.sum()) // 10
    assert kept[38:62, 28:52].all()
    assert not torch.equal(judged, held_out_kspace.split(mask, 1)[2])


def test_errors_of_the_truth_are_its_noise(head):
    slice_ = retrospective.measure(head, SETTINGS[2], 0)
    kept, _, judged = held_out_kspace.split(slice_.mask, 0)
    given = held_out_kspace.without(slice_, kept)
    assert not given.kspace[:, judged].any()
    errors = held_out_kspace.squared_errors(slice_, judged, head)
    assert errors.shape == (int(judged.sum()),)
    # 8 coils, 2 channels: a chi-square of 16 each.
    expected = 16 * slice_.noise_std**2
    assert float(errors.mean()) == pytest.approx(expected, rel=5 * (2 / 16 / len(errors)) ** 0.5)
    worse = held_out_kspace.squared_errors(slice_, judged, 0.5 * head)
    assert float(worse.mean()) > float(errors.mean())
    assert replace(slice_, mask=kept).mask is kept
