"""Three runs that a change of the code is judged by: quickstart, qlora, supplied rollouts.

    python benchmarks/reference_runs.py --out before     # with the code as it was
    python benchmarks/reference_runs.py --out after      # with the code as it is
    python benchmarks/compare_results.py before after

Only the command line is used, so that one script serves two versions: run it with the interpreter of
the virtualenv that holds the version. The runs use one thread and store no stages between them. The toy
policy is made in FOLDER/cache, or copied from --toy FOLDER, where an earlier call made it: training it
on another processor need not give the same weights.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
SMALL = {"sampling.B_E": 48, "sampling.B_U": 6, "sampling.G": 4}


def settings(name: str, out: Path) -> dict[str, object]:
    """The `--set` values of one of the three runs, over configs/quickstart.toml."""
    if name == "qlora":
        return {**SMALL, "policy.mode": "qlora", "entropy.per": "sequence"}
    if name == "supplied":
        rollouts = out / "quickstart" / "rollouts"
        return {
            "rollouts.eval": rollouts / "eval.parquet",
            "rollouts.update": rollouts / "update.parquet",
            "objective.advantage": "leave_one_out",
            "optimizer.rule": "precondition",
        }
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the three run folders")
    parser.add_argument("--toy", type=Path, help="folder of an earlier call, whose toy policy is used")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    cache = out / "cache"
    if arguments.toy and not cache.exists():
        shutil.copytree(arguments.toy / "cache", cache)
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    main_of = "import sys; from funcprobe.adapters.cli import main; sys.argv[0] = 'funcprobe'; main()"
    for name in ("quickstart", "qlora", "supplied"):
        given = settings(name, out) | {"run.folder": out, "run.name": name, "run.device": "cpu"}
        sets = [
            part
            for key, value in given.items()
            for part in (
                "--set",
                f"{key}={value if isinstance(value, int) else json.dumps(str(value))}",
            )
        ]
        command = [sys.executable, "-c", main_of, "run", str(QUICKSTART), "--fresh", *sets]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
