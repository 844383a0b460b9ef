"""The command: python data_prep/to_zarr.py SOURCE STORE [--prep configs/prep/brain_1mm.toml] (--help says more).

Spawned workers import this file again, so it does nothing unless it is the program.
"""

import sys

if __name__ == "__main__":
    try:
        import brainscale.cli
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "brainscale":
            raise
        print("error: brainscale is not installed here; run `pip install -e .` in its folder", file=sys.stderr)
        sys.exit(2)
    brainscale.cli.main(["to-zarr", *sys.argv[1:]])
