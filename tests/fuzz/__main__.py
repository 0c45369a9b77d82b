"""`python -m tests.fuzz TARGET --seconds 600`: one parser, in this process, until the time is over."""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # In memory where there is some; no accelerator, no hub; before the libraries are imported.
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fuzz.engine import fuzz

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="names of --list")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--list", action="store_true", help="the names of all targets")
    parser.add_argument("--keep", type=Path, default=Path("findings"), help="folder for their inputs")
    asked = parser.parse_args()
    if asked.list or not asked.targets:
        from fuzz.table import targets

        print("\n".join(targets()))
    else:
        sys.exit(min(1, fuzz(asked.targets, asked.seconds, asked.keep)))
