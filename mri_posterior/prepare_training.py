"""``python -m mri_posterior.prepare_training --config prepare_fastmri_brain.yaml --input DIR``: data sets to training
images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mri_posterior import cli
from mri_posterior.config import dump_config, load_config
from mri_posterior.training_plan import TrainingSetConfig, plan_training_set
from mri_posterior.training_sets import prepare_training_set


def main(arguments: Sequence[str] | None = None) -> int:
    """Every volume's header is checked before the first image is made."""
    parser = cli.parser("prepare_training", "Make images to train a prior on from k-space or NIfTI volumes.")
    options = parser.parse_args(arguments)
    config = load_config(TrainingSetConfig, options.config, cli.overrides(options))
    plans = plan_training_set(config)
    if options.dry_run:
        print(dump_config(config), end="")
        for planned in plans:
            grid = "{}x{}".format(*planned.grid)
            print(f"# {planned.path}: {planned.provenance.split}, {len(planned.slices)} slices of {grid}")
        return 0
    n_slices = prepare_training_set(config, plans)
    cli.log.info("%d slices in %s", n_slices, config.output)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
