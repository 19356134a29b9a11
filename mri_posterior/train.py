"""``python -m mri_posterior.train --config train_brain.yaml --input images.h5``: train a diffusion prior."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mri_posterior import cli
from mri_posterior.config import TrainingConfig, dump_config, load_config
from mri_posterior.training import open_training_data, train


def main(arguments: Sequence[str] | None = None) -> int:
    options = cli.parser("train", "Train a denoiser to be the prior of posterior sampling.").parse_args(arguments)
    config = load_config(TrainingConfig, options.config, cli.overrides(options))
    if options.dry_run:
        open_training_data(config).batch((config.seed, 0), config.batch, config.crop)
        print(dump_config(config), end="")
        return 0
    cli.log.info("prior written to %s", train(config))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
