"""Training as processes of their own: killed and resumed, and several that share one batch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from mri_posterior.checkpoints import CHECKPOINT
from mri_posterior.config import TrainingConfig, dump_config
from mri_posterior.training import train
from tests.test_training import assert_same_checkpoint, config, rows, write_squares

TRAIN = [sys.executable, "-m", "mri_posterior.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PATIENCE = 120  # seconds, for a busy machine; each of these takes ten or so


def arguments(settings: TrainingConfig) -> list[str]:
    path = Path(settings.output).parent / "train.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_config(settings))
    return ["--config", str(path)]


def environment() -> dict[str, str]:
    """One thread, as in these tests: sums of several threads have another order."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(command: list[str], settings: TrainingConfig) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments(settings)], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )


def test_killed_training_resumes_on_the_unbroken_curve(tmp_path):
    """SIGKILL at a moment of the system's choosing, some steps after a checkpoint: after resuming, every number of the
    curve and every weight is that of the unbroken run.
    """
    data = write_squares(tmp_path / "images.h5")
    unbroken = config(data, tmp_path / "a", steps=150, checkpoint_every=25, validate_every=50, device="cpu")
    killed = config(data, tmp_path / "b", steps=150, checkpoint_every=25, validate_every=50, device="cpu")
    process = subprocess.Popen([*TRAIN, *arguments(killed)], env=environment(), stderr=subprocess.DEVNULL)
    try:
        curve, checkpoint = Path(killed.output, "losses.csv"), Path(killed.output, CHECKPOINT)
        deadline = time.monotonic() + PATIENCE
        # Two fifths of the way from the second checkpoint to the third.
        while not (checkpoint.exists() and curve.read_bytes().count(b"\n") > 60):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()  # SIGKILL
        process.wait()
    with safe_open(checkpoint, "pt") as file:
        done = int(file.metadata()["step"])
    assert 50 <= done < 150
    assert not Path(killed.output, "model.safetensors").exists()

    train(killed)
    train(unbroken)
    assert_same_checkpoint(Path(killed.output, CHECKPOINT), Path(unbroken.output, CHECKPOINT))
    for name in ("losses.csv", "validation.csv", "model.safetensors", "score_error.json"):
        assert Path(killed.output, name).read_bytes() == Path(unbroken.output, name).read_bytes(), name
    assert len(rows(curve)) == 150


def test_two_processes_train_to_the_loss_of_one(tmp_path):
    """Four micro-batches a step, all in one process or two in each of two: the same draws and the same mean gradient,
    summed in another order.

    Summing ``g_1..g_4`` in another order moves each component of the gradient `g` by at most ``3 u mean_k |g_k|``, ``u
    = 2^-24``. Adam moves a weight by `rate` times its gradient over a running root mean square of it, so an error of
    the gradient moves the weight by about ``rate |dg_i| / |g_i|``, and the later loss by the sum over weights of
    ``|g_i|`` times that: ``rate |dg|_1 <= 3 u rate sqrt(P) max_k |g_k|_2`` per step, small gradients included. `P` is
    the number of weights, and the norm of a micro-batch's gradient is at most some times that of the mean, which the
    curve records: 10 times is allowed for, which leaves room for second order too. The loss itself is a mean of four
    single precision numbers: ``4 u`` relative.

    Processes that drew the same images, or added gradients instead of averaging them, would differ by percents.
    """
    data = write_squares(tmp_path / "images.h5")
    common = {
        "batch": 4,
        "micro_batch": 1,
        "steps": 6,
        "learning_rate": 1e-3,
        "clip": 1e9,
        "device": "cpu",
        "optimiser": "adam",
    }
    one, two = (config(data, tmp_path / name, **common) for name in ("one", "two"))
    train(one)
    result = run([*TORCHRUN, "-m", "mri_posterior.train"], two)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("training prior:") == 1, "only the first process speaks"
    assert "2 process(es) on cpu" in result.stderr

    unit = 2**-24
    weights = load_file(Path(one.output, "model.safetensors"))
    root = sum(tensor.numel() for tensor in weights.values()) ** 0.5
    tolerance = 0.0
    alone, shared = rows(Path(one.output, "losses.csv")), rows(Path(two.output, "losses.csv"))
    for a, b in zip(alone, shared, strict=True):
        assert a["learning_rate"] == b["learning_rate"]
        assert abs(a["loss"] - b["loss"]) <= tolerance + 4 * unit * a["loss"], a["step"]
        tolerance += 3 * unit * a["learning_rate"] * root * 10 * a["gradient_norm"]
    assert tolerance < 1e-2 * alone[-1]["loss"], "or it could not tell a wrong batch from a right one"
    assert (Path(two.output) / "score_error.json").exists()
    # The second process left nothing behind, and the checkpoint is one that a single process goes on from.
    assert {path.name for path in Path(one.output).iterdir()} == {path.name for path in Path(two.output).iterdir()}
    with safe_open(Path(two.output, CHECKPOINT), "pt") as file:
        assert file.metadata()["step"] == "6"


def test_all_processes_stop_where_one_meets_nan(tmp_path):
    """The second process's share of step 3 is NaN: both stop with the same line, and the whole batch is on the disk."""
    program = tmp_path / "poisoned.py"
    program.write_text(
        """
import os, sys, time
from mri_posterior import cli
from mri_posterior.train import main
from mri_posterior.training_data import MagnitudeSlices

draw = MagnitudeSlices.batch

def batch(self, key, *args, **kwargs):
    images = draw(self, key, *args, **kwargs)
    if key == (0, 2, 1) and os.environ["RANK"] == "0":
        time.sleep(2)  # only to save it does the first process draw this, and the other one has to wait for that
    return images * float("nan") if key == (0, 2, 1) else images

MagnitudeSlices.batch = batch
sys.exit(cli.run(main))
"""
    )
    settings = config(write_squares(tmp_path / "images.h5"), tmp_path, micro_batch=1, device="cpu")
    result = run([*TORCHRUN, str(program)], settings)
    assert result.returncode != 0
    assert "nan_batch.safetensors: the loss is nan at step 3" in result.stderr
    saved = load_file(Path(settings.output, "nan_batch.safetensors"))
    assert saved["clean"].shape == (2, 32, 24)
    assert [bool(image.isnan().any()) for image in saved["clean"]] == [False, True]
    assert len(rows(Path(settings.output, "losses.csv"))) == 2
