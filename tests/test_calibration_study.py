"""The calibration study on slices whose posterior is known, and the command from end to end.

Where the figures are judged, samples are drawn around a known mean by a law that is right, or wrong in a known way; the
sampler itself is judged elsewhere.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import yaml

from mri_posterior import calibrate, calibration_study, cli
from mri_posterior.calibration_data import Case, Key, MagnitudeCases, VolumeCases, simulated_slice
from mri_posterior.calibration_scores import score_slice
from mri_posterior.calibration_study import certify, check_study
from mri_posterior.certificate_page import page
from mri_posterior.certificates import CERTIFICATE, Certificate, read
from mri_posterior.config import CalibrationConfig, CalibrationSetting, PriorConfig, ReconstructionConfig, load_config
from mri_posterior.conformal import ConformalConfig
from mri_posterior.errors import UserError
from mri_posterior.masks import MaskConfig
from mri_posterior.noise import stable_seed
from mri_posterior.posterior import PosteriorSamples
from mri_posterior.priors import NetworkConfig, NetworkPrior, load_prior
from tests.test_commands import SIDE, write_volume

SHAPE, NOISE = (24, 20), 0.04
CONFORMAL = ConformalConfig(levels=(0.8,), delta=0.2)


def rng_of(*key) -> np.random.Generator:
    return np.random.default_rng(stable_seed(*key))


def white(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


class KnownCases:
    """Discs whose posterior is white noise of a known, varying level around a mean that was drawn before."""

    description = "discs"
    keys = [Key(f"s{subject}", f"v{subject}", index) for subject in range(16) for index in range(2)]

    def __init__(self, truth_noise_std: float = 0.0):
        self.truth_noise_std = truth_noise_std
        rows, columns = np.indices(SHAPE)
        self.disc = np.hypot(rows - 12, columns - 10) < 9
        self.level = NOISE * (0.5 + columns / 10)

    def drawn_as(self, key: Key) -> Key:
        """The key that everything random of a slice is drawn with."""
        return key

    def mean(self, key: Key) -> np.ndarray:
        return self.disc * (4 + 0.2 * white(rng_of("mean", *key), *SHAPE))

    def case(self, setting: CalibrationSetting, key: Key) -> Case:
        key = self.drawn_as(key)
        rng = rng_of("truth", *key)
        truth = self.mean(key) + self.disc * self.level * white(rng, *SHAPE)
        truth = truth + self.truth_noise_std * white(rng, *SHAPE)
        image = torch.from_numpy(self.mean(key)).to(torch.complex64)
        slice_ = simulated_slice(image, torch.ones(SHAPE, dtype=torch.bool), 0.01, torch.Generator().manual_seed(0))
        return Case(slice_, truth, self.truth_noise_std, (2.0, 2.0))


LAWS = {
    "right": lambda mean, noise: mean + noise,
    "over-dispersed": lambda mean, noise: mean + 1.4 * noise,
    "under-dispersed": lambda mean, noise: mean + 0.7 * noise,
    "biased": lambda mean, noise: mean * 1.01 + noise,
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function that certifies samples of the law so named."""
    (tmp_path / "prior").mkdir()
    (tmp_path / "prior" / "model.safetensors").write_bytes(b"weights")
    prior = SimpleNamespace(config=SimpleNamespace(anatomy="discs"))
    calls = []

    def run(law: str, source: KnownCases | None = None, **changes) -> Certificate:
        source = source or KnownCases()
        config = CalibrationConfig(
            prior=PriorConfig(str(tmp_path / "prior")),
            settings=(CalibrationSetting("all", MaskConfig("none"), (0.01, 0.01)),),
            input="discs",
            output=str(tmp_path / law),
            conformal=CONFORMAL,
        )

        def sample(reconstruction: ReconstructionConfig, slice_, prior, key) -> PosteriorSamples:
            calls.append(key)
            drawn = source.drawn_as(Key(*key[2:]))
            noise = source.disc * source.level * white(rng_of("samples", *drawn), reconstruction.samples, *SHAPE)
            return PosteriorSamples(torch.from_numpy(LAWS[law](source.mean(drawn), noise)), 0, [])

        monkeypatch.setattr(calibration_study, "reconstruct_slice", sample)
        return certify(replace(config, **changes), source, prior)

    run.calls = calls
    return run


def test_right_samples_have_the_figures_they_must(study):
    """All estimates within 4 standard errors (of 16 subjects: t of 15 degrees, 1 in 1000 each).

    Student's intervals of 8 samples are exact for normal draws; here magnitudes are normal but for 0.2 % of the level,
    and interpolated order statistics (0.5) are a little wide.
    """
    certificate = study("right")
    (setting,) = certificate.settings
    assert setting.faults == ()
    for estimate in (setting.spread_skill, setting.averaging_gain, setting.crps, setting.correlation):
        assert abs(estimate.z) < 4
    for figures in setting.levels:
        assert abs(figures.coverage.value - figures.level) < 4 * figures.coverage.standard_error + 0.005
    assert setting.averaging_gain.expected == pytest.approx(10 * np.log10(16 / 9))
    assert setting.correlation.value > 0.1, "the level varies over the image, and the samples show it"
    assert sum(setting.ranks) == 32 * 6
    assert setting.rank_p_value > 0.001 and setting.tarp_p_value > 0.001
    for _, error, right in setting.reliability:
        # 1,600 pixels a bin: each root mean square is known to 1/sqrt(2n), 2 %.
        assert error == pytest.approx(right, rel=0.12)
    spreads = [spread for spread, _, _ in setting.reliability]
    assert spreads == sorted(spreads) and spreads[-1] > 2 * spreads[0]
    # Both are shares of 1,600 pixels near 0.9: 4 standard errors of their difference, and 7 samples instead of 8.
    assert all(part.value == pytest.approx(part.expected, abs=0.05) for part in setting.width_coverage)
    assert certificate.n_subjects == 16 and certificate.n_slices == 32
    assert certificate.n_calibration == certificate.n_test == 8
    assert setting.mask == "fully sampled" and setting.noise_std == (0.01, 0.01)


@pytest.mark.parametrize("law", ["over-dispersed", "under-dispersed", "biased"])
def test_a_fault_is_named_shows_in_the_figures_and_is_made_good_by_the_factor(study, law):
    """On other subjects. The promise may fail in a fifth of the calibration sets; seeded."""
    (setting,) = study(law).settings
    assert len(setting.faults) == 1 and law in setting.faults[0]
    by_level = {figures.level: figures for figures in setting.levels}
    z = by_level[0.9].coverage.z
    assert z > 4 if law == "over-dispersed" else z < -4
    # 32 ranks are no match for sums over 8,000 pixels: wrong spread they need not see.
    assert law != "biased" or setting.rank_p_value < 1e-3
    made_good = by_level[0.8]
    assert made_good.conformal_coverage.value > 0.8 - 4 * made_good.conformal_coverage.standard_error
    assert made_good.factor > 1.2 or law == "over-dispersed"
    assert by_level[0.9].factor is None


def test_coverage_is_that_of_the_test_subjects_alone(study):
    """The truths of the calibration subjects are off by several standard deviations, those of the others are right."""

    class Halved(KnownCases):
        wrong: list[str] = []

        def case(self, setting, key):
            case = super().case(setting, key)
            return replace(case, truth=case.truth * (1.05 if key.subject in self.wrong else 1))

    setting = CalibrationSetting("a", MaskConfig("none"), (1, 1))
    source = Halved()
    source.wrong, others = check_study(
        CalibrationConfig(PriorConfig("x"), (setting,), input="x", conformal=CONFORMAL), source
    )
    assert len(others) == 8 and not set(others) & set(source.wrong)
    (figures,) = study("right", source).settings
    for of_level in figures.levels:
        # 4,000 pixels: a standard error of 0.008 at most. With the others' it would be about half of the level.
        assert of_level.coverage.value == pytest.approx(of_level.level, abs=0.04)
    assert figures.levels[1].factor > 3 and figures.levels[1].conformal_coverage.value > 0.99
    assert figures.faults, "the other figures are of all subjects"


def test_two_slices_of_a_subject_that_are_one_count_as_one(study):
    class Twice(KnownCases):
        def drawn_as(self, key):
            return key._replace(index=0)

    once = KnownCases()
    once.keys = [key for key in once.keys if key.index == 0]
    twice, single = (study("right", source, conformal=None).settings[0] for source in (Twice(), once))
    for name in ("spread_skill", "averaging_gain", "crps", "correlation"):
        ours, theirs = getattr(twice, name), getattr(single, name)
        assert ours.standard_error == pytest.approx(theirs.standard_error)
        assert ours.value == pytest.approx(theirs.value)
    assert twice.levels[0].coverage.standard_error == pytest.approx(single.levels[0].coverage.standard_error)


def test_a_noisy_truth_is_allowed_for(study):
    """Noise as large as the posterior's deviation, independent of it: unbiased figures, wider errors."""
    (setting,) = study("right", KnownCases(truth_noise_std=0.06)).settings
    assert setting.faults == ()
    assert abs(setting.spread_skill.z) < 4 and abs(setting.averaging_gain.z) < 4
    assert abs(setting.crps.z) < 4 and setting.tarp_p_value > 0.001
    coverage = {f.level: f.coverage.value for f in setting.levels}
    # The wider end of what `metrics.interval_coverage` says of 8 samples: 0 to 0.02 above the level.
    assert -0.015 < coverage[0.9] - 0.9 < 0.035
    (ignored,) = study("biased", KnownCases(truth_noise_std=0.06)).settings
    assert "biased" in ignored.faults[0]


def test_a_study_goes_on_where_it_stopped_and_repeats_itself(study, tmp_path):
    class Interrupted(KnownCases):
        def case(self, setting, key):
            if key.subject == "s3":
                raise KeyboardInterrupt
            return super().case(setting, key)

    with pytest.raises(KeyboardInterrupt):
        study("right", Interrupted())
    done = len(study.calls)
    assert 0 < done < 32
    resumed = study("right")
    assert len(study.calls) == 32
    assert study("right") == resumed
    assert len(study.calls) == 32, "nothing is sampled again"
    study("right", samples=9)
    assert len(study.calls) == 64, "other samples are another study"
    for file in (tmp_path / "right" / "slices").iterdir():
        file.unlink()
    assert study("right") == resumed


def test_too_few_units_are_refused_before_anything_is_sampled(study):
    with pytest.raises(UserError, match="at least 22 calibration subjects, there are 8"):
        study("right", conformal=ConformalConfig(levels=(0.9,), unit="subject"))
    assert study.calls == []
    assert study("right", conformal=None).unit is None


def test_masks_of_several_kinds_are_no_setting(study):
    class Mixed(KnownCases):
        def case(self, setting, key):
            case = super().case(setting, key)
            mask = case.slice_.mask.clone()
            mask[:, 1::2] = key.index > 0
            return replace(case, slice_=replace(case.slice_, mask=mask))

    with pytest.raises(UserError, match="several kinds"):
        study("right", Mixed())


def test_scores_of_one_slice_by_hand():
    """Truth 1 on a square, samples 1 ± 0.1 in turn: no error, and intervals that hold it."""
    truth = np.zeros(SHAPE, complex)
    truth[6:18, 5:15] = 1
    image = torch.from_numpy(truth).to(torch.complex64)
    slice_ = simulated_slice(image, torch.ones(SHAPE, dtype=torch.bool), 0.01, torch.Generator().manual_seed(0))
    images = truth * (1 + 0.1 * np.array([1, -1, 1, -1]))[:, None, None]
    scores = score_slice(Case(slice_, truth, 0.0, (2.0, 2.0)), images, (0.5, 0.9), 0)
    assert scores.pixels == 120
    assert scores.inside.tolist() == [120, 120]
    assert scores.variance == pytest.approx(120 * 0.04 / 3)
    assert scores.error == pytest.approx(0) and scores.squared_error == pytest.approx(0)
    # Mean distance to the truth 0.1; mean of half the distance of two samples: 4 of 6 pairs are 0.2 apart.
    assert scores.crps == pytest.approx(120 * np.array([0.1 - 0.2 / 3, 0.2 / 3]))
    assert scores.bins[0].sum() == scores.wide[0].sum() == 120
    assert scores.regions.shape == (6, 6)
    assert scores.correlation.tolist() == [0, 0]


@pytest.fixture
def dataset(tmp_path):
    """Four validation subjects and one for training, whose slices are brighter."""
    rows, columns = np.indices((32, 24))
    disc = np.exp(-((rows - 16) ** 2 + (columns - 12) ** 2) / 60)
    path = tmp_path / "images.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.stack([(150 + 5 * i % 40) * disc for i in range(25)]).astype(np.uint8)
        file["subject_index"] = np.repeat([3, 0, 1, 4, 2], 5)
        file["split"] = np.array([b"val", b"val", b"train", b"val", b"val"])
        file.attrs["voxel_mm"] = (2.0, 2.0, 2.0)
    return path


@pytest.fixture(scope="module")
def tiny_prior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("priors") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        NetworkPrior(NetworkConfig(channels=(8, 8), anatomy="discs")).save(folder, "random, for tests")
    return folder


@pytest.fixture
def command(tmp_path, dataset, tiny_prior):
    """Runs the command on the data set with a tiny random network."""
    shutil.copytree(tiny_prior, tmp_path / "prior")
    tree = {
        "prior": {"name": str(tmp_path / "prior")},
        "input": str(dataset),
        "output": str(tmp_path / "out"),
        "settings": [
            {"name": "lines", "mask": {"kind": "equispaced", "acceleration": 2, "center_fraction": 0.3},
             "noise_std": [0.01, 0.02]},
        ],
        "slices_per_subject": 2,
        "sampler": {"name": "annealed_langevin", "diffusion_steps": 2, "guided_steps": 1, "levels": 1,
                    "final_steps": 1, "spectrum_probes": 1},
        "samples": 4,
        "conformal": {"levels": [0.5], "delta": 0.3, "bound": "hoeffding_bentkus"},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    return lambda *more: cli.run(calibrate.main, ["--config", str(tmp_path / "mine.yaml"), *more])


def test_the_command_writes_a_certificate(command, tmp_path, capsys):
    assert command("--dry-run") == 0
    assert "8 slices in 1 settings" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert command("--set", "beside_prior=true") == 0
    certificate = read(tmp_path / "out" / CERTIFICATE)
    assert capsys.readouterr().out == page(certificate) == (tmp_path / "out" / "certificate.md").read_text()
    assert read(tmp_path / "prior" / CERTIFICATE) == certificate
    assert certificate.anatomy == "discs" and certificate.samples == 4 and certificate.voxel_size_mm == (2, 2)
    assert certificate.n_slices == 8 and (certificate.rows, certificate.columns) == ((32, 32), (24, 24))
    assert certificate.settings[0].mask == "1-D equispaced"
    low, high = certificate.settings[0].noise_std
    assert 0.01 <= low < high <= 0.02
    prior = load_prior(str(tmp_path / "prior"))
    assert prior.config.anatomy == "discs", "a certificate beside a prior does not disturb it"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--input", "nowhere.h5"], "nowhere.h5: not a set of magnitude slices"),
        (["--set", "input=null"], "give --input"),
        (["--set", "conformal.delta=0.2", "--set", "conformal.unit=subject"], "at least 3 calibration subjects"),
        (["--set", "conformal.levels=[0.7]"], "must be among levels"),
        (["--set", "kind=volumes"], "noise_std is for kind magnitude"),
        (
            ["--set", "settings=[{name: a, mask: {knd: none}, noise_std: [1, 2]}]"],
            "unknown key settings.0.mask.knd: did",
        ),
        (["--set", "settings=[{name: a, mask: {}, noise_std: [2, 1]}]"], "noise_std (2.0, 1.0)"),
        (["--set", "subjects=2"], "four at least"),
        (["--samples", "3"], "samples"),
    ],
)
def test_mistakes_are_told_in_one_line(command, capsys, tmp_path, options, said):
    assert command(*options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def magnitude_config(dataset, **changes) -> CalibrationConfig:
    setting = CalibrationSetting("one", MaskConfig("equispaced", 2, 0.3), (0.01, 0.04))
    return CalibrationConfig(PriorConfig("x"), (setting,), input=str(dataset), slices_per_subject=3, **changes)


PRIOR = SimpleNamespace(config=NetworkConfig(voxel_size_mm=(1.9, 2.1)))


def test_magnitude_slices_are_of_validation_subjects_measured_as_said(dataset):
    config = magnitude_config(dataset)
    source = MagnitudeCases(config, PRIOR)
    assert {key.subject for key in source.keys} == {"subject0", "subject1", "subject3", "subject4"}
    assert [key.index for key in source.keys[:3]] == [1, 2, 3]
    levels = set()
    for key in source.keys[:4]:
        case = source.case(config.settings[0], key)
        again = source.case(config.settings[0], key)
        assert torch.equal(case.slice_.kspace, again.slice_.kspace)
        assert np.quantile(np.abs(case.truth), 0.99) == pytest.approx(1, abs=1e-3)
        maps = case.slice_.maps.numpy()
        clean = np.fft.fftshift(
            np.fft.fft2(np.fft.ifftshift(maps * case.truth, axes=(1, 2)), norm="ortho"), axes=(1, 2)
        )
        noise = (case.slice_.kspace.numpy() - clean)[:, case.slice_.mask.numpy()]
        assert noise.real.std() == pytest.approx(case.slice_.noise_std, rel=5 / np.sqrt(2 * noise.size))
        levels.add(round(case.slice_.noise_std, 6))
    assert len(levels) == 4, "each slice has a noise level of its own"
    assert all(0.01 <= level <= 0.04 for level in levels)


def test_volumes_are_fully_sampled_and_their_own_noise_is_known(tmp_path):
    """The corners hold air, so that the truth's noise is seen there: 64 pixels, 128 values, 9 % of itself uncertain in
    each of four slices, and the level is an estimate of the rim's own.
    """
    # The file's readout is oversampled twice: 32 rows of 2 mm are kept.
    for name, patient in (("a", "nobody"), ("b", "somebody")):
        with h5py.File(write_volume(tmp_path / f"{name}.h5"), "r+") as file:
            rng = rng_of(name)
            file["kspace"][...] += (3e-6 * white(rng, *file["kspace"].shape)).astype(np.complex64)
            file.attrs["patient_id"] = patient
    config = CalibrationConfig(
        PriorConfig("x"),
        (CalibrationSetting("one", MaskConfig("equispaced", 2, 0.3)),),
        kind="volumes",
        input=str(tmp_path),
        slices_per_subject=2,
        conformal=None,
    )
    source = VolumeCases(config, PRIOR)
    assert {(key.subject, key.volume) for key in source.keys} == {("nobody", "a"), ("somebody", "b")}
    assert check_study(config, source) == ([], ["nobody", "somebody"])
    for key in source.keys:
        case = source.case(config.settings[0], key)
        corners = case.truth[np.ix_([0, 1, 2, 3, -4, -3, -2, -1], [0, 1, 2, 3, -4, -3, -2, -1])]
        assert np.sqrt(np.mean(np.abs(corners) ** 2) / 2) == pytest.approx(case.truth_noise_std, rel=0.35)
        assert case.voxel_size_mm == pytest.approx((2.0, 2.0))
        assert not case.slice_.mask.all()
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["mask"] = np.arange(SIDE) % 2 == 0
    with pytest.raises(UserError, match="leave it out"):
        VolumeCases(config, PRIOR)


def test_the_shipped_configuration_is_that_of_the_reconstruction():
    ours, theirs = (
        load_config(CalibrationConfig, "calibrate_brain.yaml"),
        load_config(ReconstructionConfig, "brain4x.yaml"),
    )
    for name in ("prior", "sampler", "samples", "warm_start", "coils"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine.name, other.name)[0] == other.name if name == "prior" else mine == other
    assert json.dumps([s.name for s in ours.settings]) == '["equispaced 4x", "Poisson 8x"]'
