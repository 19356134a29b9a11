"""Training: data that depend on the step alone, a loss that means what it says, and exact resume."""

from __future__ import annotations

import csv
import json
import logging
import threading
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mri_posterior.checkpoints import CHECKPOINT, StepTable
from mri_posterior.config import TrainingConfig, dump_config, load_config, parse_override
from mri_posterior.errors import UserError
from mri_posterior.exact import white
from mri_posterior.priors import NetworkConfig, NetworkPrior, load_prior
from mri_posterior.train import main
from mri_posterior.training import ahead, denoising_loss, draw_micro_batch, draw_sigma, train
from mri_posterior.training_data import KneePhantoms, MagnitudeSlices
from mri_posterior.training_report import VALIDATION_SIGMAS, TrainingLog, report, validation_loss

SMALL = NetworkConfig(channels=(8, 8))


def write_squares(path: Path) -> Path:
    """Twelve slices of three subjects, the last of them held out: bright squares of a subject's own size."""
    images = np.zeros((12, 32, 24), np.uint8)
    for i in range(12):
        images[i, 8 : 16 + 4 * (i // 4), 6:18] = 100 + i
    with h5py.File(path, "w") as file:
        file["images"] = images
        file["subject_index"] = np.repeat(np.arange(3), 4)
        file["split"] = np.array([b"train", b"train", b"val"])
    return path


def config(dataset: Path, folder: Path, **settings) -> TrainingConfig:
    """Eight steps of a tiny network, checkpoints after the fourth and the eighth."""
    defaults = {"batch": 2, "steps": 8, "crop": (32, 24), "checkpoint_every": 4, "network": SMALL, "warmup": 2}
    defaults |= {"report_images": 8, "validate_every": 0, "sheet_every": 0}
    return TrainingConfig(input=str(dataset), output=str(folder / "prior"), **defaults | settings)


def rows(path: Path) -> list[dict[str, float]]:
    with open(path) as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """To the last bit; the order of the metadata in the file is not fixed."""
    with safe_open(first, "pt") as a, safe_open(second, "pt") as b:
        assert a.metadata() == b.metadata()
        assert set(a.keys()) == set(b.keys())
        assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118


@pytest.fixture
def dataset(tmp_path):
    return write_squares(tmp_path / "images.h5")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run that several tests look at, and its settings."""
    folder = tmp_path_factory.mktemp("trained")
    settings = config(write_squares(folder / "images.h5"), folder)
    train(settings)
    return settings


@pytest.mark.parametrize("crop", [(32, 24), (40, 32), (24, 16)])
def test_batches_depend_on_their_key_alone(dataset, crop):
    data = MagnitudeSlices(dataset)
    a, b, c = (data.batch(key, 3, crop) for key in ((0, 1), (0, 1), (0, 2)))
    assert a.shape == (3, *crop)
    assert a.dtype == torch.complex64
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_batch_may_hold_no_view_of_the_template(dataset):
    pytest.importorskip("nilearn", reason="the brain template comes with nilearn (extra: samples)")
    images = MagnitudeSlices(dataset, template_share=1e-9).batch(("t",), 3, (32, 24))
    assert images.shape == (3, 32, 24)


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


def test_noise_levels_stay_in_the_declared_range():
    sigma = draw_sigma(10_000, SMALL, torch.Generator().manual_seed(0))
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


def interrupt(settings: TrainingConfig, step: int) -> None:
    """Run `settings` until the data of `step`, counted from 0, are asked for."""
    original = MagnitudeSlices.batch

    def batch(self, key, *args, **kwargs):
        if key == (settings.seed, step):
            raise KeyboardInterrupt
        return original(self, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MagnitudeSlices, "batch", batch)
        with pytest.raises(KeyboardInterrupt):
            train(settings)


def test_resumed_training_is_the_unbroken_one(trained, tmp_path):
    """Interrupted two steps after a checkpoint: curve and weights are those of the unbroken run, to the last bit."""
    interrupted = replace(trained, output=str(tmp_path / "prior"))
    interrupt(interrupted, 6)
    folder, whole = Path(interrupted.output), Path(trained.output)
    assert len(rows(folder / "losses.csv")) == 6
    with open(folder / "losses.csv", "a") as file:
        file.write("7,0.12")  # killed while writing a row
    train(interrupted)
    assert_same_checkpoint(folder / CHECKPOINT, whole / CHECKPOINT)
    for name in ("losses.csv", "model.safetensors", "README.md"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert [row["step"] for row in rows(whole / "losses.csv")] == list(range(1, 9))


def test_curve_starts_anew_without_a_checkpoint(trained, tmp_path):
    """Killed before its first checkpoint, a run begins again, and so does its curve."""
    settings = replace(trained, output=str(tmp_path / "prior"))
    interrupt(settings, 2)
    train(settings)
    assert (tmp_path / "prior" / "losses.csv").read_bytes() == Path(trained.output, "losses.csv").read_bytes()


def test_tables_are_cut_to_the_checkpoint_and_only_then(tmp_path):
    path = tmp_path / "a.csv"
    table = StepTable(path, ["x"], 0)
    for step in (1, 2, 10):
        table.append(step, [step / 3])
    table.close()
    StepTable(path, ["x"], 2).close()
    assert rows(path) == [{"step": 1, "x": 1 / 3}, {"step": 2, "x": 2 / 3}]
    with pytest.raises(UserError, match=r"a\.csv: not the table"):
        StepTable(path, ["y"], 2)
    StepTable(path, ["y"], 0).close()
    assert path.read_text() == "step,y\n"


def test_checkpoints_of_the_first_format_are_still_read(trained, tmp_path):
    """Checkpoints once knew only these settings; the curve goes on all the same."""

    settings = replace(trained, output=str(tmp_path / "prior"))
    interrupt(settings, 5)
    path = tmp_path / "prior" / CHECKPOINT
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    known = json.loads(metadata["config"])
    first_format = ("dataset", "network", "crop", "batch", "learning_rate", "warmup", "ema", "seed")
    old = {key: known[key] for key in first_format}
    old["network"].pop("notes")
    save_file(tensors, path, metadata={"step": metadata["step"], "config": json.dumps(old)})
    (tmp_path / "prior" / "losses.csv").unlink()
    train(settings)
    assert rows(tmp_path / "prior" / "losses.csv") == rows(Path(trained.output, "losses.csv"))[4:]
    save_file(tensors, path, metadata={"step": "4", "config": json.dumps(old | {"warmup": 3})})
    with pytest.raises(UserError, match=r"another configuration \(warmup differs\)"):
        train(settings)
    save_file({}, path, metadata={"step": "4", "config": json.dumps(old)})
    with pytest.raises(UserError, match="does not fit the network"):
        train(settings)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="broken checkpoint"):
        train(settings)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_drawn_ahead_are_the_same(trained, tmp_path, workers):
    settings = replace(trained, output=str(tmp_path / "prior"), workers=workers)
    train(settings)
    assert rows(tmp_path / "prior" / "losses.csv") == rows(Path(trained.output, "losses.csv"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("draw")]


def test_drawing_ahead_keeps_order_and_passes_errors_on():
    assert list(ahead(lambda key: key**2, range(9), workers=2)) == [key**2 for key in range(9)]
    squares = ahead(lambda key: 1 / (3 - key), range(9), workers=2)
    assert [next(squares) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(squares)
    drawn: list[int] = []
    started = ahead(drawn.append, range(100), workers=2)
    next(started)
    started.close()
    assert len(drawn) <= 5, "two items per worker ahead, and no more once nobody asks"


def test_micro_batches_add_up_to_their_batch(dataset, tmp_path, monkeypatch):
    """The loss of a step is the mean over the images of its micro-batches, and the step is taken along the gradient of
    that mean: the same weights as by one pass through the network with all of them, within rounding.

    Rounding, relative 2^-24, moves the gradient by that much of its 1-norm; Adam turns this into a change of a later
    loss of about ``learning_rate |g|_1 2^-24 <= 1e-3 sqrt(3e4) 30 / 2^24 < 1e-6`` per step (see
    test_training_distributed), here over 4 steps.
    """
    split = config(dataset, tmp_path / "split", batch=4, micro_batch=1, steps=4, learning_rate=1e-3)
    whole = replace(split, output=str(tmp_path / "whole" / "prior"), micro_batch=None)
    train(split)

    def all_at_once(config, data, step, index):
        parts = [draw_micro_batch(split, data, step, i) for i in range(4)]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    monkeypatch.setattr("mri_posterior.training.draw_micro_batch", all_at_once)
    train(whole)
    one, many = (rows(Path(settings.output, "losses.csv")) for settings in (whole, split))
    for a, b in zip(one, many, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=4e-6)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
    with pytest.raises(UserError, match="micro_batch 3 does not divide batch 4"):
        replace(split, micro_batch=3)


def test_micro_batches_differ():
    settings = TrainingConfig(dataset="knee_phantom", crop=(32, 24), batch=2, micro_batch=1, network=SMALL)
    draws = [draw_micro_batch(settings, KneePhantoms(), step, index) for step, index in ((0, 0), (0, 1), (1, 0))]
    for tensors in zip(*draws, strict=True):
        assert not any(torch.equal(a, b) for a, b in ((tensors[0], tensors[1]), (tensors[0], tensors[2])))


def test_what_a_run_shows_of_itself(dataset, tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(dataset, tmp_path, validate_every=4, sheet_every=8, sheet_images=2)
    with caplog.at_level(logging.INFO, "mri_posterior"):
        folder = train(settings)
    assert any(" GB, 1 steps: 0 min" in message and "s/step" in message for message in caplog.messages)
    validation = rows(folder / "validation.csv")
    assert [row["step"] for row in validation] == [4, 8]
    final = validation_loss(load_prior(folder), MagnitudeSlices(dataset), settings.crop)
    # The finished prior is stored in half precision: relative rounding 2^-11 of its weights.
    assert [validation[1][sigma] for sigma in final] == pytest.approx(list(final.values()), rel=0.01)
    assert (folder / "samples" / "step_0000008.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    losses = rows(folder / "losses.csv")
    for tag in ("loss", "learning_rate", "gradient_norm"):
        shown = events.Scalars(f"training/{tag}")
        assert [event.step for event in shown] == [row["step"] for row in losses]
        assert [event.value for event in shown] == pytest.approx([row[tag] for row in losses], rel=1e-6)
    assert len(events.Tags()["scalars"]) == 3 + len(VALIDATION_SIGMAS)
    assert [event.step for event in events.Images("samples")] == [8]
    # Warm-up over two steps, then the cosine's decay.
    assert [row["learning_rate"] for row in losses[:2]] == pytest.approx(
        [settings.learning_rate * share for share in (0.5, 0.5 * (1 + np.cos(np.pi / 8)))]
    )


def test_steps_that_are_done_again_are_shown_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TrainingLog(tmp_path, 0)
    for step in (1, 2, 3):
        first.step(step, 1.0, 1.0, 1.0)
    first.close()
    second = TrainingLog(tmp_path, 2)
    second.step(3, 5.0, 1.0, 1.0)
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("training/loss")] == [(1, 1.0), (2, 1.0), (3, 5.0)]


def test_samples_that_diverge_do_not_stop_training(dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(NetworkPrior, "forward", lambda self, x, sigma: x * float("nan"))
    settings = config(dataset, tmp_path, steps=2, sheet_every=1)
    monkeypatch.setattr("mri_posterior.training.report", lambda *a: None)
    train(settings)
    assert any("no samples of the prior" in message for message in caplog.messages)
    assert not (tmp_path / "prior" / "samples").exists()


def test_training_goes_on_from_another_prior(trained, dataset, tmp_path):
    """Its weights are where training starts, its digest of settings makes another run, and its network must fit."""
    source = Path(trained.output)
    tuned = config(dataset, tmp_path, init_from=str(source), steps=1, learning_rate=1e-12)
    folder = train(tuned)
    for key, value in load_prior(source).state_dict().items():
        assert torch.allclose(load_prior(folder).state_dict()[key], value, atol=1e-6), key
    assert f"the weights of {source}" in (folder / "README.md").read_text()
    with pytest.raises(UserError, match=r"init_from differs"):
        train(replace(tuned, init_from=None))
    with pytest.raises(UserError, match=r"network.sigma_data is 0.3, here it is 0.4"):
        train(config(dataset, tmp_path / "b", init_from=str(source), network=replace(SMALL, sigma_data=0.4)))
    with pytest.raises(UserError, match="no such"):
        train(config(dataset, tmp_path / "c", init_from=str(tmp_path / "nowhere")))


def test_training_leaves_the_global_generator_alone(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("mri_posterior.training.report", lambda *a: None)  # it loads a prior, which draws one first
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    train(config(dataset, tmp_path, steps=1, workers=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_half_precision_is_for_gpus(dataset, tmp_path):
    with pytest.raises(UserError, match=r"precision bf16: .*cpu.* set precision to no"):
        train(config(dataset, tmp_path, precision="bf16", device="cpu"))
    assert not (tmp_path / "prior").exists()


def test_half_precision_stays_inside_of_the_network(generator):
    """Autocast hands out half precision, of which no complex image can be made: the loss is single precision all the
    same, and near that of single precision.

    bfloat16 rounds by 2^-9 relative; some ten layers on the way let a loss of order one move by a few per cent.
    """
    prior = NetworkPrior(SMALL)
    clean, noise = (white(generator, 2, 8, 8, dtype=torch.complex64) for _ in range(2))
    sigma = torch.tensor([0.1, 1.0])
    expected = denoising_loss(prior, clean, sigma, noise)
    original = prior.unet.forward

    def forward(*arguments):  # autocast around the network alone: on a CPU it would convert the output back
        with torch.autocast("cpu", torch.bfloat16):
            return original(*arguments)

    prior.unet.forward = forward
    loss = denoising_loss(prior, clean, sigma, noise)
    loss.mean().backward()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, expected, rtol=0.05)
    assert not torch.equal(loss, expected)
    assert all(torch.isfinite(weight.grad).all() for weight in prior.parameters())


def test_precision_is_written_bare_in_yaml(tmp_path):
    """YAML reads `no` as false."""
    (tmp_path / "a.yaml").write_text("precision: no\n")
    assert load_config(TrainingConfig, str(tmp_path / "a.yaml")).precision == "no"
    bf16 = load_config(TrainingConfig, str(tmp_path / "a.yaml"), dict([parse_override("precision=bf16")]))
    assert bf16.precision == "bf16"
    (tmp_path / "b.yaml").write_text(dump_config(bf16))
    assert load_config(TrainingConfig, str(tmp_path / "b.yaml")) == bf16
    with pytest.raises(UserError, match="precision"):
        load_config(TrainingConfig, str(tmp_path / "a.yaml"), {"precision": True})


def test_compile_goes_through_torch(dataset, tmp_path, monkeypatch):
    """Only that the network is compiled, in place: compiling itself takes minutes."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    train(config(dataset, tmp_path, steps=1, compile=True))
    assert compiled == ["UNet2DModel"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_prior_is_reported_on_and_can_be_again(dataset, tmp_path):
    settings = config(dataset, tmp_path)
    folder = train(settings)
    before = contents(folder)
    errors = json.loads(before["score_error.json"])
    assert [level["sigma"] for level in errors["levels"]] == list(VALIDATION_SIGMAS)
    assert errors["images"] == 8
    table = [line for line in before["README.md"].decode().splitlines() if line.startswith("| 0.")]
    level = errors["levels"][0]
    assert float(table[0].split("|")[4]) == pytest.approx(level["denoising"]["mean_square"] ** 0.5, rel=0.01)
    assert table[0].split("|")[-2].strip() == "-", "8 images say nothing of one in a thousand"
    (folder / "score_error.json").unlink()
    (folder / "README.md").write_text("")
    (tmp_path / "train.yaml").write_text(dump_config(settings))
    assert main(["--config", str(tmp_path / "train.yaml"), "--report-only"]) == 0
    assert contents(folder) == before
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


def test_checkpoint_of_other_settings_is_refused(trained):
    with pytest.raises(UserError, match=r"another configuration \(batch differs\)"):
        train(replace(trained, batch=3))
    with pytest.raises(UserError, match=r"\(network.sigma_data differs\)"):
        train(replace(trained, network=replace(SMALL, sigma_data=0.4)))


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


def test_nan_loss_stops_and_keeps_its_batch(dataset, tmp_path, monkeypatch):
    original = MagnitudeSlices.batch

    def batch(self, key, n, crop, **kwargs):
        images = original(self, key, n, crop, **kwargs)
        return images * float("nan") if key == (0, 2, 1) else images

    monkeypatch.setattr(MagnitudeSlices, "batch", batch)
    settings = config(dataset, tmp_path, batch=4, micro_batch=2)
    with pytest.raises(UserError, match=r"nan_batch\.safetensors: the loss is nan at step 3") as caught:
        train(settings)
    assert "\n" not in str(caught.value)
    saved = load_file(tmp_path / "prior" / "nan_batch.safetensors")
    assert int(saved["step"]) == 3
    for index, part in enumerate(("finite", "nan")):
        for name, tensor in zip(
            ("clean", "sigma", "noise"), draw_micro_batch(settings, MagnitudeSlices(dataset), 2, index), strict=True
        ):
            assert torch.equal(saved[name][2 * index : 2 * index + 2].nan_to_num(), tensor.nan_to_num())
        assert bool(saved["clean"][2 * index].isnan().any()) == (part == "nan")
    assert len(rows(tmp_path / "prior" / "losses.csv")) == 2
    assert not (tmp_path / "prior" / "model.safetensors").exists()


def test_processes_that_cannot_share_a_batch_are_told_so(dataset, tmp_path, monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 2)
    with pytest.raises(UserError, match=r"2 processes cannot share 3 micro-batch\(es\) equally: set micro_batch"):
        train(config(dataset, tmp_path, batch=3, micro_batch=1))
    with pytest.raises(UserError, match=r"2 processes cannot share 1 micro-batch\(es\)"):
        train(config(dataset, tmp_path))
    assert not (tmp_path / "prior").exists()


def test_infinite_gradient_stops(dataset, tmp_path, monkeypatch):
    """A finite loss may have a gradient that is not; the step it asks for would be the last."""
    monkeypatch.setattr(
        "mri_posterior.training.denoising_loss",
        lambda prior, *_: sum((weight * 0).abs().sqrt().sum() for weight in prior.parameters())[None],
    )
    with pytest.raises(UserError, match="the gradient is not finite at step 1"):
        train(config(dataset, tmp_path))


def test_the_last_steps_see_whole_images(dataset, tmp_path):
    settings = config(dataset, tmp_path, steps=6, crop=(16, 16), late_crop=(32, 24), late_steps=2)
    data = MagnitudeSlices(dataset)
    shapes = [tuple(draw_micro_batch(settings, data, step, 0)[0].shape[1:]) for step in range(6)]
    assert shapes == [(16, 16)] * 4 + [(32, 24)] * 2
    assert json.loads((train(settings) / "score_error.json").read_text())["crop"] == [32, 24]
    with pytest.raises(UserError, match="late_crop"):
        config(dataset, tmp_path, late_steps=2)
