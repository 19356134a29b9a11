"""``python -m mri_posterior.evaluate --config knee4x.yaml``: fastMRI's metrics and interval
coverage of a results folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mri_posterior import cli
from mri_posterior.baselines import BASELINES
from mri_posterior.config import ReconstructionConfig, load_config
from mri_posterior.evaluation import evaluate_folder, format_table
from mri_posterior.preparation import input_volumes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser("evaluate", "Score the reconstructions in --output against the references in --input.")
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out zero-filled, CG-SENSE, L1-wavelet and TV"
    )
    options = parser.parse_args(arguments)
    config = load_config(ReconstructionConfig, options.config, cli.overrides(options))
    if options.dry_run:
        print("\n".join(str(path) for path in input_volumes(config)))
        return 0
    print(format_table(evaluate_folder(config, () if options.no_baselines else tuple(BASELINES))))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
