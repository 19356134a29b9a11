"""``python -m mri_posterior.sources --config brain4x.yaml --slice 1``: how much of the uncertainty comes from noise,
missing k-space, coil maps and the prior.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from mri_posterior import cli
from mri_posterior.config import ReconstructionConfig, load_config
from mri_posterior.device import pick_device
from mri_posterior.errors import UserError
from mri_posterior.files import require_writable
from mri_posterior.preparation import input_volumes, plan_volume, prepare
from mri_posterior.priors import load_prior
from mri_posterior.uncertainty_sources import MIN_REPEATS, format_table, sources_of_slice


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser("sources", "Split a slice's variance into noise, missing k-space, coil maps and prior.")
    parser.add_argument("--slice", type=int, metavar="N", help="which slice (default: the middle one)")
    parser.add_argument("--repeats", type=int, default=4, metavar="N", help="sets of coil maps and of missing k-space")
    parser.add_argument(
        "--priors", nargs="+", default=[], metavar="PRIOR", help="further priors, as believable as the configuration's"
    )
    options = parser.parse_args(arguments)
    if options.repeats < MIN_REPEATS:
        raise UserError(f"--repeats {options.repeats}: the errors of the shares need at least {MIN_REPEATS}")
    config = load_config(ReconstructionConfig, options.config, cli.overrides(options))
    settings = {config.prior.name: config.prior}
    settings |= {
        name: replace(config.prior, name=name, adapter=None) for name in options.priors if name not in settings
    }
    device = pick_device(config.device)
    priors = {name: load_prior(name, prior.adapter).to(device) for name, prior in settings.items()}
    plans = []
    for path in input_volumes(config):
        plan, *others = (plan_volume(replace(config, prior=settings[n]), path, priors[n]) for n in priors)
        index = plan.slices[len(plan.slices) // 2] if options.slice is None else options.slice
        for name, other in zip(list(priors)[1:], others, strict=True):
            if other.grid != plan.grid:
                raise UserError(
                    f"{path}: prior {name} has another resolution than {config.prior.name}: list priors of one"
                )
        prepare(config, plan, index)
        plans.append((plan, index))
    runs = 2 * options.repeats * len(priors)
    for plan, index in plans:
        cost = f"{runs} runs of {config.samples} samples: the work of {runs} slices"
        print(f"{plan.volume.name}, slice {index}: {cost}", flush=True)
    if options.dry_run:
        return 0
    require_writable(config.output)
    for plan, index in plans:
        print(format_table(sources_of_slice(config, plan, priors, index, options.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
