"""``python -m mri_posterior.train --config train_brain.yaml --input images.h5``: train a diffusion prior.

With ``--report-only``, measure the prior that is in ``--output`` anew: its ``score_error.json`` and model card.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mri_posterior import cli
from mri_posterior.config import TrainingConfig, dump_config, load_config
from mri_posterior.training import draw_micro_batch, train
from mri_posterior.training_report import open_training_data, report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser("train", "Train a denoiser to be the prior of posterior sampling.")
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing: measure the prior in --output and rewrite its card"
    )
    options = parser.parse_args(arguments)
    config = load_config(TrainingConfig, options.config, cli.overrides(options))
    if options.dry_run:
        draw_micro_batch(config, open_training_data(config), step=0, index=0)
        print(dump_config(config), end="")
        return 0
    if options.report_only:
        cli.log.info("report written to %s", report(config))
        return 0
    cli.log.info("prior written to %s", train(config))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
