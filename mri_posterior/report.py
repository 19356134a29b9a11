"""``python -m mri_posterior.report --config knee4x.yaml``: each reconstruction of a results folder as one HTML page."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from mri_posterior import cli
from mri_posterior.config import ReconstructionConfig, load_config
from mri_posterior.evaluation import find_result
from mri_posterior.preparation import input_volumes
from mri_posterior.report_page import write_report

log = logging.getLogger("mri_posterior")


def main(arguments: Sequence[str] | None = None) -> int:
    """Every volume is shown with the settings it was reconstructed with, whatever the configuration says today."""
    parser = cli.parser("report", "Show the reconstructions in --output as HTML pages that need no network.")
    options = parser.parse_args(arguments)
    config = load_config(ReconstructionConfig, options.config, cli.overrides(options))
    results = [(path, find_result(config, path)) for path in input_volumes(config)]
    if options.dry_run:
        print("\n".join(str(result_path) for _, result_path in results))
        return 0
    for path, result_path in results:
        log.info("%s written", write_report(path, result_path))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
