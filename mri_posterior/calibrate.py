"""``python -m mri_posterior.calibrate --config calibrate_brain.yaml --input DATA``: is the uncertainty right where the
truth is known? Writes a certificate.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mri_posterior import cli
from mri_posterior.calibration_data import case_source
from mri_posterior.calibration_study import certify, check_study
from mri_posterior.certificate_page import page
from mri_posterior.certificates import write
from mri_posterior.config import CalibrationConfig, dump_config, load_config
from mri_posterior.device import pick_device
from mri_posterior.errors import UserError
from mri_posterior.files import require_writable
from mri_posterior.priors import load_prior, prior_path


def main(arguments: Sequence[str] | None = None) -> int:
    options = cli.parser("calibrate", "Judge and certify uncertainty on data with known truth.").parse_args(arguments)
    config = load_config(CalibrationConfig, options.config, cli.overrides(options))
    folders = [config.output]
    if config.beside_prior:
        folders.append(str(prior_path(config.prior.name)))
        if not prior_path(config.prior.name).is_dir():
            raise UserError(f"{folders[1]}: no directory, so nothing can lie beside it: set beside_prior=false")
    prior = load_prior(config.prior.name, config.prior.adapter).to(pick_device(config.device))
    source = case_source(config, prior)
    calibration, test = check_study(config, source)
    if options.dry_run:
        print(dump_config(config), end="")
        print(f"# {len(source.keys)} slices in {len(config.settings)} settings, {config.samples} samples each;")
        print(f"# subjects: {len(calibration)} to make the intervals conformal, {len(test)} to test them")
        return 0
    for folder in folders:
        require_writable(folder)
    certificate = certify(config, source, prior)
    text = page(certificate)
    for folder in folders:
        write(certificate, folder, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
