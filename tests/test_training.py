"""Training: data that depend on the step alone, a loss that means what it says, and exact resume."""

from __future__ import annotations

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from mri_posterior.config import TrainingConfig, dump_config
from mri_posterior.errors import UserError
from mri_posterior.exact import white
from mri_posterior.priors import NetworkConfig, NetworkPrior, load_prior
from mri_posterior.train import main
from mri_posterior.training import VALIDATION_SIGMAS, denoising_loss, draw_sigma, report, train, validation_loss
from mri_posterior.training_data import KneePhantoms, MagnitudeSlices, smooth_field

SMALL = NetworkConfig(channels=(8, 8))


@pytest.fixture
def dataset(tmp_path):
    """Twelve slices of three subjects, the last of them held out: bright squares of a subject's own size."""
    images = np.zeros((12, 32, 24), np.uint8)
    for i in range(12):
        images[i, 8 : 16 + 4 * (i // 4), 6:18] = 100 + i
    path = tmp_path / "images.h5"
    with h5py.File(path, "w") as file:
        file["images"] = images
        file["subject_index"] = np.repeat(np.arange(3), 4)
        file["split"] = np.array([b"train", b"train", b"val"])
    return path


def config(dataset, tmp_path, **settings) -> TrainingConfig:
    defaults = {"batch": 2, "steps": 8, "crop": (32, 24), "checkpoint_every": 4, "network": SMALL, "warmup": 2}
    defaults |= {"report_images": 8}
    return TrainingConfig(input=str(dataset), output=str(tmp_path / "prior"), **defaults | settings)


@pytest.mark.parametrize("crop", [(32, 24), (40, 32), (24, 16)])
def test_batches_depend_on_their_key_alone(dataset, crop):
    data = MagnitudeSlices(dataset)
    a, b, c = (data.batch(key, 3, crop) for key in ((0, 1), (0, 1), (0, 2)))
    assert a.shape == (3, *crop)
    assert a.dtype == torch.complex64
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_subjects_are_never_shared_between_training_and_validation(dataset):
    """The held-out subject's square is 16 rows high, the others' 8 and 12; held-out images are not resampled."""
    held_out = MagnitudeSlices(dataset).batch(("v",), 20, (32, 24), held_out=True)
    heights = (held_out.abs() > 0.5).any(-1).sum(-1)
    assert set(heights.tolist()) == {16}


def test_images_have_the_scale_that_reconstruction_gives_them(dataset):
    images = MagnitudeSlices(dataset).batch(("v",), 8, (32, 24), held_out=True)
    assert torch.allclose(images.abs().flatten(1).quantile(0.99, dim=1), torch.ones(8), atol=0.02)
    knees = KneePhantoms().batch((0,), 2, (64, 48), held_out=True)
    assert knees.shape == (2, 64, 48)
    assert float(knees.abs().max()) < 2.5


def test_smooth_fields_have_unit_power_and_no_high_frequencies():
    field = smooth_field((4, 32, 40), torch.Generator().manual_seed(0))
    assert torch.allclose(field.square().mean((1, 2)), torch.ones(4), atol=1e-4)
    assert float(field.diff(dim=-1).abs().max()) < 0.1 * float(field.abs().max()) * 4


def test_noise_levels_stay_in_the_declared_range():
    sigma = draw_sigma(10_000, NetworkPrior(SMALL), torch.Generator().manual_seed(0))
    assert sigma.min() >= SMALL.sigma_min - 1e-9
    assert sigma.max() <= SMALL.sigma_max + 1e-5
    # A fifth is log-uniform over 7.6 nats of which 4.8 lie above 0.08; half of the rest does.
    assert float((sigma > 0.08).float().mean()) == pytest.approx(0.4 + 0.2 * 4.83 / 7.6, abs=5 * 0.5 / 100)


def test_loss_is_the_denoising_error_in_the_networks_units(generator):
    prior = NetworkPrior(SMALL).eval()
    clean, noise = (white(generator, 3, 16, 16, dtype=torch.complex64) for _ in range(2))
    sigma = torch.tensor([0.05, 0.3, 2.0])
    with torch.no_grad():
        loss = denoising_loss(prior, clean, sigma, noise)
        level = sigma[:, None, None]
        error = (prior(clean + level * noise, sigma) - clean).abs().square().mean((1, 2)) / 2
    weight = (sigma**2 + SMALL.sigma_data**2) / (sigma * SMALL.sigma_data) ** 2
    assert torch.allclose(loss, weight * error, rtol=1e-3)


def test_resumed_training_is_the_unbroken_one(dataset, tmp_path):
    whole = train(config(dataset, tmp_path / "a"))
    train(config(dataset, tmp_path / "b", steps=8, checkpoint_every=4))
    # Stop after the checkpoint of step 4 by asking for no more; then ask for the rest.
    interrupted = config(dataset, tmp_path / "c")
    with pytest.MonkeyPatch.context() as patch:
        calls = []

        def batch(self, key, *args, original=MagnitudeSlices.batch, **kwargs):
            calls.append(key)
            if key == (0, 6):
                raise KeyboardInterrupt
            return original(self, key, *args, **kwargs)

        patch.setattr(MagnitudeSlices, "batch", batch)
        with pytest.raises(KeyboardInterrupt):
            train(interrupted)
    resumed = train(interrupted)
    a, b = load_prior(whole), load_prior(resumed)
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key
    card = (resumed / "README.md").read_text()
    assert "error on held-out subjects" in card


def test_a_prior_is_reported_on_and_can_be_again(dataset, tmp_path):
    settings = config(dataset, tmp_path)
    folder = train(settings)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    errors = json.loads(before["score_error.json"])
    assert [level["sigma"] for level in errors["levels"]] == list(VALIDATION_SIGMAS)
    assert errors["images"] == 8
    rows = [line for line in before["README.md"].decode().splitlines() if line.startswith("| 0.")]
    level = errors["levels"][0]
    assert float(rows[0].split("|")[4]) == pytest.approx(level["denoising"]["mean_square"] ** 0.5, rel=0.01)
    assert rows[0].split("|")[-2].strip() == "-", "8 images say nothing of one in a thousand"
    (folder / "score_error.json").unlink()
    (folder / "README.md").write_text("")
    (tmp_path / "train.yaml").write_text(dump_config(settings))
    assert main(["--config", str(tmp_path / "train.yaml"), "--report-only"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(UserError, match="another network"):
        report(replace(settings, network=replace(SMALL, sigma_data=0.4)))


def test_training_reduces_the_loss(dataset, tmp_path):
    """Thirty steps on squares: the validation error at every middling sigma falls below that of the untrained
    network.
    """
    settings = config(dataset, tmp_path, steps=40, batch=4, learning_rate=3e-3, ema=0.8)
    torch.manual_seed(0)
    untrained = validation_loss(NetworkPrior(SMALL), MagnitudeSlices(dataset), (32, 24), n=16)
    trained = validation_loss(load_prior(train(settings)), MagnitudeSlices(dataset), (32, 24), n=16)
    assert all(trained[s] < untrained[s] for s in ("0.1", "0.2", "0.5"))


def test_checkpoint_of_other_settings_is_refused(dataset, tmp_path):
    train(config(dataset, tmp_path))
    with pytest.raises(UserError, match="another configuration"):
        train(config(dataset, tmp_path, batch=3))


def test_missing_or_wrong_training_data(tmp_path):
    with pytest.raises(UserError, match="--input"):
        MagnitudeSlices(None)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = np.zeros((1, 4, 4))
    with pytest.raises(UserError, match="subject_index"):
        MagnitudeSlices(tmp_path / "x.h5")
    (tmp_path / "y.h5").write_text("text")
    with pytest.raises(UserError, match="not a training set"):
        MagnitudeSlices(tmp_path / "y.h5")


def test_nan_loss_stops(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mri_posterior.training.denoising_loss", lambda *a: torch.tensor([float("nan")], requires_grad=True)
    )
    with pytest.raises(FloatingPointError, match="step 0"):
        train(config(dataset, tmp_path))
