"""Is the shipped brain prior's uncertainty right on held-out subjects, as given and with conformal factors?

    python -m benchmarks.calibration_table --input ixi_brain_t1_2mm.h5 --write

What ``calibrate`` does with ``calibrate_brain.yaml``, whose certificate it writes too; an interrupted run goes on. The
table goes into docs/calibration.md.
"""

from __future__ import annotations

import argparse
import logging

from benchmarks.exactness import ROOT, put_between
from mri_posterior.calibration_data import case_source
from mri_posterior.calibration_study import certify
from mri_posterior.certificate_page import figures_table, page
from mri_posterior.certificates import Certificate, write
from mri_posterior.config import CalibrationConfig, load_config
from mri_posterior.device import pick_device
from mri_posterior.priors import load_prior


def section(certificate: Certificate) -> str:
    """The table, what it is of, and the faults that were found."""
    of = (
        f"Prior `{certificate.prior}` ({certificate.prior_digest[:12]}), {certificate.n_subjects} subjects, "
        f"{certificate.n_slices} slices, {certificate.samples} samples each."
    )
    faults = [f"- {setting.name}: {'; '.join(setting.faults) or 'no fault found'}" for setting in certificate.settings]
    return "\n\n".join([of, figures_table(certificate), "\n".join(faults)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="magnitude slices with a split by subject")
    parser.add_argument("--config", default="calibrate_brain.yaml")
    parser.add_argument("--prior", help="instead of the configuration's")
    parser.add_argument("--write", action="store_true", help="put the table into docs/calibration.md")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    overrides = {"input": options.input} | ({"prior.name": options.prior} if options.prior else {})
    config = load_config(CalibrationConfig, options.config, overrides)
    prior = load_prior(config.prior.name, config.prior.adapter).to(pick_device(config.device))
    certificate = certify(config, case_source(config, prior), prior)
    write(certificate, config.output, page(certificate))
    print(section(certificate))
    if options.write:
        put_between(ROOT / "docs" / "calibration.md", "calibration", section(certificate))


if __name__ == "__main__":
    main()
