"""``python -m mri_posterior.reconstruct --config knee4x.yaml``: k-space in, posterior samples and uncertainty out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mri_posterior import cli
from mri_posterior.config import ReconstructionConfig, dump_config, load_config
from mri_posterior.device import pick_device
from mri_posterior.pipeline import check_output, reconstruct_volume
from mri_posterior.preparation import check_slices, input_volumes, plan_volume, prepare
from mri_posterior.priors import load_prior


def main(arguments: Sequence[str] | None = None) -> int:
    """Everything a user can get wrong is checked for every volume before the first is sampled."""
    options = cli.parser("reconstruct", "Draw samples of the posterior p(image | k-space).").parse_args(arguments)
    config = load_config(ReconstructionConfig, options.config, cli.overrides(options))
    prior = load_prior(config.prior.name, config.prior.adapter).to(pick_device(config.device))
    plans = [plan_volume(config, path, prior) for path in input_volumes(config)]
    for plan in plans:
        check_slices(plan)
        prepare(config, plan, plan.slices[0])
    if options.dry_run:
        print(dump_config(config), end="")
        for plan in plans:
            print(f"# {plan.volume.path}: {len(plan.slices)} slices, {config.samples} samples each")
        return 0
    check_output(config, plans)
    for plan in plans:
        reconstruct_volume(config, plan, prior)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
