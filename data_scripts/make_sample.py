"""Write one of the simulated sample volumes: python data_scripts/make_sample.py knee|brain [--output DIR]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import h5py

from mri_posterior.embedded import SampleName, sample_volume
from mri_posterior.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a simulated multi-coil volume in fastMRI's layout.")
    parser.add_argument("name", choices=get_args(SampleName))
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the file (default: the user's cache)")
    options = parser.parse_args(arguments)
    try:
        path = sample_volume(options.name, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with h5py.File(path, "r") as file:
        print(f"{path}: SIMULATED, k-space {list(file['kspace'].shape)} [slice, coil, H, W]. {file.attrs['note']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
