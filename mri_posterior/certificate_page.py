"""A certificate as a page for readers, and its main figures as a table."""

from __future__ import annotations

from collections.abc import Sequence

from mri_posterior.calibration import Estimate
from mri_posterior.certificates import Certificate, LevelFigures, SettingFigures, value_range

FEWEST_FOR_FAULTS = 8
"""Subjects: of fewer, Student's law asks for more than 3.5 standard errors, and silence means little."""


def figures_table(certificate: Certificate) -> str:
    """One row per setting: coverage as given and conformal, spread and skill, gain."""
    levels = [figures.level for figures in certificate.settings[0].levels]
    scaled = [f.level for f in certificate.settings[0].levels if any(s.factor(f.level) for s in certificate.settings)]
    header = ["setting", *(f"{level:.0%} interval holds" for level in levels)]
    header += [f"{level:.0%} conformal holds (factor)" for level in scaled]
    header += ["spread/skill V/B", "gain of averaging, dB (expected)"]
    rows = []
    for setting in certificate.settings:
        by_level = {figures.level: figures for figures in setting.levels}
        gain = setting.averaging_gain
        rows.append(
            [
                setting.name,
                *(_share(by_level[level].coverage) for level in levels),
                *(_conformal(by_level[level]) for level in scaled),
                _plain(setting.spread_skill),
                f"{_plain(gain)} ({gain.expected:.2f})",
            ]
        )
    return _table(header, rows)


def page(certificate: Certificate) -> str:
    """All of it in Markdown, one page."""
    c = certificate
    sampler = ", ".join(f"{key} {value}" for key, value in c.sampler.items())
    lines = [
        f"# What is certified of the uncertainty of `{c.prior}`",
        f"Truths: {c.data}. {c.n_subjects} subjects, {c.n_slices} slices, {c.samples} samples each; rows "
        f"{value_range(c.rows)}, columns {value_range(c.columns)}, voxels of {value_range(c.voxel_size_mm)} mm. "
        f"Anatomy: {c.anatomy or 'not said'}. "
        "All figures are of the magnitude on tissue (above 5 % of the slice's maximum); ± is the standard error over "
        "subjects.",
        figures_table(c),
        _guarantee(c),
        *(_setting(c, setting) for setting in c.settings),
        "## Made with",
        f"Prior `{c.prior}`, SHA-256 `{c.prior_digest}`. Warm start {c.warm_start}. Sampler: {sampler}.",
    ]
    return "\n\n".join(lines) + "\n"


def _guarantee(c: Certificate) -> str:
    """What the conformal factors promise, and what they do not."""
    if c.unit is None:
        return "No intervals were made conformal. Coverage is that of all subjects."
    promise = (
        f"Coverage is that of {c.n_test} test subjects. The conformal factors come from {c.n_calibration} others "
        f"({c.bound.replace('_', '-')} bound, delta {c.delta:g}): intervals scaled by them about their middle hold at "
        f"least the stated share of a slice's tissue on average, with probability {1 - c.delta:g} over calibration "
        "sets, for further data of the same kind, whatever the prior is worth."
    )
    if c.unit == "subject":
        return promise
    return promise + (
        " **The unit is the slice, and slices of one subject are not independent**: the promise is exact for further "
        "slices of a population in which every slice comes from a subject of its own, and too optimistic for these "
        "subjects, whose slices tell less than as many subjects would. What the factors achieve on subjects never used "
        "is what the table says of the test subjects, with its standard error."
    )


def _setting(c: Certificate, setting: SettingFigures) -> str:
    low, high = setting.noise_std
    noise = f"{low:.3g} to {high:.3g}"
    level = c.settings[0].levels[max(len(setting.levels) - 2, 0)].level
    bins = _table(
        ["pixels from the surest to the least sure fifth", *map(str, range(1, len(setting.reliability) + 1))],
        [
            ["standard deviation (rms)", *(f"{std:.4f}" for std, _, _ in setting.reliability)],
            ["error (rms)", *(f"{error:.4f}" for _, error, _ in setting.reliability)],
            ["error of right samples", *(f"{right:.4f}" for _, _, right in setting.reliability)],
            [f"{level:.0%} interval holds, by its width", *map(_share, setting.width_coverage)],
            ["intervals of right samples", *(f"{100 * part.expected:.1f} %" for part in setting.width_coverage)],
        ],
    )
    p_values = ", ".join(
        f"{name} p = {value:.2g}"
        for name, value in (("ranks", setting.rank_p_value), ("TARP", setting.tarp_p_value))
        if value is not None
    )
    widths = ", ".join(f"{figures.level:.0%}: {figures.width:.4f}" for figures in setting.levels)
    return "\n\n".join(
        [
            f"## {setting.name}",
            f"Mask {setting.mask}, acceleration {setting.acceleration:.2f}, centre {setting.centre[0]} x "
            f"{setting.centre[1]}; noise {noise} of the image's 99th percentile per real channel. "
            + _faults(c, setting),
            f"CRPS {setting.crps.value:.5f} ± {setting.crps.standard_error:.5f} (right samples: "
            f"{setting.crps.expected:.5f}). Correlation of standard deviation and absolute error "
            f"{_plain(setting.correlation)} (right samples: {setting.correlation.expected:.2f}). "
            f"Mean widths: {widths}.",
            bins,
            "Right samples: with one of them in the truth's place. Few samples know their own spread poorly, so that "
            "sorting by it puts even theirs off the diagonal.",
            f"Ranks of the truth's regional means among the samples, 0 to {len(setting.ranks) - 1}: "
            f"{' '.join(map(str, setting.ranks))}"
            + (f" ({p_values}, as if slices were independent)." if p_values else "."),
        ]
    )


def _faults(c: Certificate, setting: SettingFigures) -> str:
    if setting.faults:
        return f"**{'; '.join(setting.faults)}.**"
    return "No fault found." if c.n_subjects >= FEWEST_FOR_FAULTS else "Too few subjects to name faults."


def _conformal(figures: LevelFigures) -> str:
    if figures.factor is None:
        return "none found"
    return f"{_share(figures.conformal_coverage)} ({figures.factor:.2f})"


def _share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} ± {100 * estimate.standard_error:.1f} %"


def _plain(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ± {estimate.standard_error:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
