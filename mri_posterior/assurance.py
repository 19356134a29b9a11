"""What a reconstruction may promise: its prior's certificate, held against each slice, and intervals scaled by it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass

from mri_posterior.certificates import Certificate, Scan, SettingFigures, find
from mri_posterior.config import ReconstructionConfig
from mri_posterior.errors import UserError
from mri_posterior.preparation import Plan, PreparedSlice, reconstructed_voxel_size
from mri_posterior.priors import prior_digest


@dataclass(frozen=True)
class SliceAssurance:
    """The certified setting nearest to a slice, what lies outside of it, and the factor of its intervals.

    `factor` is None where intervals are left as they are.
    """

    setting: SettingFigures
    warnings: tuple[str, ...]
    factor: float | None


@dataclass(frozen=True)
class Assurance:
    """A prior's certificate while a volume is reconstructed; without one there is nothing to promise."""

    certificate: Certificate
    config: ReconstructionConfig
    digest: str

    def of_slice(self, plan: Plan, prepared: PreparedSlice) -> SliceAssurance:
        slice_ = prepared.slice_
        voxel = reconstructed_voxel_size(self.config, plan)
        scan = Scan(slice_.mask.numpy(), slice_.noise_std, voxel)
        setting, warnings = self.certificate.match(scan, self.config, self.digest)
        factor = setting.factor(self.config.level) if self.config.conformal else None
        return SliceAssurance(setting, tuple(warnings), factor)

    def to_json(self, slices: list[SliceAssurance]) -> str:
        """What a result file says of it: attribute ``certificate``, of the setting that most slices are nearest to."""
        name = Counter(s.setting.name for s in slices).most_common(1)[0][0]
        setting = next(s.setting for s in slices if s.setting.name == name)
        warnings = list(dict.fromkeys(warning for s in slices for warning in s.warnings))
        figures = setting.at(self.config.level)
        line = _line(self.config, setting, figures and figures.coverage.value, warnings)
        content = {
            "line": line,
            "setting": name,
            "prior": self.certificate.prior,
            "data": self.certificate.data,
            "subjects": self.certificate.n_subjects,
            "conformal": self.config.conformal,
            "outside": warnings,
            "spread_skill": asdict(setting.spread_skill),
            "faults": list(setting.faults),
            "levels": [asdict(f) for f in setting.levels],
        }
        return json.dumps(content)


def open_assurance(config: ReconstructionConfig) -> Assurance | None:
    """The certificate that `config` names, or else the one beside its prior; None where there is none.

    Raises
    ------
    UserError: a certificate that cannot be read; conformal intervals without one that has a factor for their level.
    """
    certificate = find(config.prior.name, config.certificate)
    if config.conformal and certificate is None:
        raise UserError(
            f"conformal intervals need a calibration certificate and prior {config.prior.name} has none: run calibrate "
            "and give its folder with --set certificate=…, or set conformal to false"
        )
    if certificate is None:
        return None
    if config.conformal and any(setting.factor(config.level) is None for setting in certificate.settings):
        raise UserError(
            f"the certificate of prior {certificate.prior} has no conformal factor for level {config.level:g} in every "
            "setting: set level to one that it has, or run calibrate with conformal.levels"
        )
    return Assurance(certificate, config, prior_digest(config.prior.name))


def _line(config: ReconstructionConfig, setting: SettingFigures, coverage: float | None, warnings: list[str]) -> str:
    if warnings:
        return f"outside of what was certified ({setting.name}): " + "; ".join(warnings)
    if config.conformal:
        return f"certified for {setting.name}: {config.level:.0%} intervals are conformal"
    held = "" if coverage is None else f": {config.level:.0%} intervals held {coverage:.0%} of held-out tissue"
    return f"certified for {setting.name}{held}"
