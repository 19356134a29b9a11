from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
from scipy import stats

from mri_posterior import embedded
from mri_posterior.embedded import cache_folder, sample_volume
from mri_posterior.errors import UserError

SHAPES = {"knee": ((320, 168), (160, 160), 1.0), "brain": ((240, 96), (120, 96), 2.0)}


@pytest.fixture(scope="module", params=SHAPES)
def made(request, tmp_path_factory) -> tuple[str, Path]:
    if request.param == "brain":
        pytest.importorskip("nilearn", reason="the brain template comes with nilearn (extra: samples)")
    return request.param, sample_volume(request.param, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def knee(tmp_path_factory) -> Path:
    return sample_volume("knee", tmp_path_factory.mktemp("knee"))


@pytest.fixture
def own_knee(knee, tmp_path) -> Path:
    """A copy that a test may spoil."""
    path = tmp_path / knee.name
    path.write_bytes(knee.read_bytes())
    return path


def read(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """K-space, target and noise level; the k-space in double precision, so that sums of squares are exact."""
    with h5py.File(path) as file:
        return file["kspace"][()].astype(complex), file["reconstruction_rss"][()], file.attrs["simulated_noise_std"]


def to_images(kspace: np.ndarray) -> np.ndarray:
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes=axes), axes=axes, norm="ortho"), axes=axes)


def crop(images: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    top, left = ((n - m) // 2 for n, m in zip(images.shape[-2:], shape, strict=True))
    return images[..., top : top + shape[0], left : left + shape[1]]


def test_layout_is_fastmris(made):
    name, path = made
    encoded, recon, voxel = SHAPES[name]
    assert path.name == f"simulated_{name}.h5"
    with h5py.File(path) as file:
        assert file["kspace"].shape == (4, 8, *encoded)
        assert file["kspace"].dtype == np.complex64
        assert file["reconstruction_rss"].shape == (4, *recon)
        assert file["reconstruction_rss"].dtype == np.float32
        assert file.attrs["patient_id"] == f"simulated-{name}"
        assert "SIMULATED" in file.attrs["acquisition"]
        assert bool(file.attrs["target_noise_free"])
        assert "ot a scan" in file.attrs["note"]
        target = file["reconstruction_rss"][()]
        assert file.attrs["max"] == pytest.approx(target.max())
        assert file.attrs["norm"] == pytest.approx(np.sqrt(np.sum(target.astype(float) ** 2)))
        root = ElementTree.fromstring(file["ismrmrd_header"][()])

    def number(path: str) -> float:
        return float(root.findtext("{*}encoding/" + "/".join("{*}" + step for step in path.split("/"))))

    for space, shape in (("encodedSpace", encoded), ("reconSpace", recon)):
        for axis, n in zip("xy", shape, strict=True):
            assert number(f"{space}/matrixSize/{axis}") == n
            assert number(f"{space}/fieldOfView_mm/{axis}") == n * voxel
    limits = "encodingLimits/kspace_encoding_step_1"
    assert number(f"{limits}/minimum") == 0
    assert number(f"{limits}/maximum") == encoded[1] - 1
    assert number(f"{limits}/center") == encoded[1] // 2


def test_intensities_are_of_fastmris_order(made):
    target = read(made[1])[1]
    assert 5e-5 < target.max() < 2e-4


def test_noise_is_of_the_level_and_coupling_that_the_attribute_promises(made):
    kspace, target, noise_std = read(made[1])
    assert 0.01 < noise_std / np.percentile(target, 99) < 0.02
    # Beyond the reconstructed rows there is no object.
    margin = (kspace.shape[-2] - target.shape[-2]) // 2
    air = to_images(kspace)[..., :margin, :]
    noise = np.moveaxis(air, 1, 0).reshape(8, -1)
    n = noise.shape[1]
    for part in (noise.real, noise.imag):  # a standard deviation of n draws is known to 1/sqrt(2n)
        assert part.std(axis=1) == pytest.approx(noise_std, rel=5 / np.sqrt(2 * n))
    correlation = np.abs(np.corrcoef(noise))[np.triu_indices(8, 1)]
    assert correlation == pytest.approx(0.2, abs=5 / np.sqrt(n))


def test_target_is_the_root_sum_of_squares_without_the_noise(made):
    kspace, target, noise_std = read(made[1])
    images = crop(to_images(kspace), target.shape[-2:])
    error = (np.sqrt(np.sum(np.abs(images) ** 2, axis=1)) - target) / noise_std
    # |rss(s + n) - rss(s)| <= rss(n), and |n|^2 is at most the covariance's largest eigenvalue, 0.8 + 8 * 0.2,
    # times a chi-squared variable of two degrees of freedom per coil.
    assert np.abs(error).max() < np.sqrt(2.4 * stats.chi2.isf(1e-4 / error.size, 16))
    # Where signal dominates only the noise along it counts, whose variance lies between the eigenvalues 0.8 and 2.4;
    # the noise across it, at most 15 * 2.4 in square, raises the sum by that over twice the signal.
    bright = target > 30 * noise_std
    assert 0.8 * 0.97 < error[bright].var() < 2.4 * 1.03
    assert 0 < error[bright].mean() < 15 * 2.4 / 60
    assert bright.mean() > 0.1


def test_second_make_is_identical_to_the_byte(knee, tmp_path):
    again = sample_volume("knee", tmp_path / "new" / "folder")
    with h5py.File(knee) as first, h5py.File(again) as second:
        for name in ("kspace", "reconstruction_rss"):
            assert first[name][()].tobytes() == second[name][()].tobytes()
        assert dict(first.attrs) == dict(second.attrs)


def test_file_in_the_cache_is_reused(own_knee):
    before = own_knee.stat()
    assert sample_volume("knee", own_knee.parent) == own_knee
    after = own_knee.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("spoil", ["stale", "without recipe", "not HDF5"])
def test_file_of_another_recipe_is_made_anew(knee, own_knee, spoil):
    if spoil == "not HDF5":
        own_knee.write_bytes(b"something else")
    else:
        with h5py.File(own_knee, "r+") as file:
            del file.attrs["recipe"], file["kspace"]
            if spoil == "stale":
                file.attrs["recipe"] = "mri_posterior knee 0"
    assert sample_volume("knee", own_knee.parent) == own_knee
    assert np.array_equal(read(own_knee)[0], read(knee)[0])


def test_failed_write_leaves_what_was_there(own_knee, monkeypatch):
    monkeypatch.setattr(embedded, "_VERSION", 0)  # so that the file counts as stale
    before = own_knee.read_bytes()
    create = h5py.Group.create_dataset

    def fail_at_second(self, name, *args, **kwargs):
        if name != "kspace":
            raise OSError("no space left")
        return create(self, name, *args, **kwargs)

    monkeypatch.setattr(h5py.Group, "create_dataset", fail_at_second)
    with pytest.raises(UserError, match=r"simulated_knee\.h5: cannot be written"):
        sample_volume("knee", own_knee.parent)
    assert own_knee.read_bytes() == before
    assert list(own_knee.parent.iterdir()) == [own_knee]


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MRI_POSTERIOR_CACHE", str(tmp_path / "chosen"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("MRI_POSTERIOR_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "mri_posterior"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mri_posterior"


def test_default_folder_is_the_cache_and_a_bad_one_is_named(monkeypatch, knee, tmp_path):
    monkeypatch.setenv("MRI_POSTERIOR_CACHE", str(knee.parent))
    assert sample_volume("knee") == knee
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("MRI_POSTERIOR_CACHE", str(blocked / "inside"))
    with pytest.raises(UserError, match="MRI_POSTERIOR_CACHE"):
        sample_volume("knee")


def test_unknown_sample_is_refused(tmp_path):
    # A TypeError where the annotations are checked, before our own check is reached.
    with pytest.raises((UserError, TypeError), match="elbow"):
        sample_volume("elbow", tmp_path)
