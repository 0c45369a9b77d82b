"""Engines of sampling: tokens a second by length of the responses, and whether they sample the policy.

    python benchmarks/sampling.py [CONFIG] [--set KEY=VALUE] [--lengths 4,16,64] [--prompts N]

Both engines draw the same responses to the same prompts of the configuration (by default the
quickstart's); seconds are those of all of it, each engine's trial included. Ratios are taken within a
repetition. z is of log-probability plus entropy, summed over each response of engine "continuous",
whose mean is 0 if the policy sampled it.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

from shapes import machine, paired, print_table, ratio

import funcprobe
from funcprobe import sampler_checks
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.sampling.generate import sample_responses
from funcprobe.adapters.sampling.prompts import draw_with_replacement
from funcprobe.adapters.stages.plan import load

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
ENGINES = ("batched", "continuous")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, default=QUICKSTART)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--lengths", default="4,16,64,256,512", help="longest responses, tokens")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    plan = load(read_config(args.config, args.set), Narrator())
    index = draw_with_replacement(args.prompts, len(plan.prompts), 0)
    prompts = [plan.prompt_ids[i] for i in index]
    print(machine(plan.policy.model.device))
    columns = ["longest", "mean", "same", "tokens / s", "continuous", "in batched's time", "z"]
    table = []
    for length in map(int, args.lengths.split(",")):
        found, calls = {}, {}
        for engine in ENGINES:
            config = plan.config.sampling.model_copy(
                update={"engine": engine, "max_new_tokens": length, "top_p": 1.0, "top_k": 0}
            )
            calls[engine] = partial(sample_responses, plan.policy, prompts, config, 0)
            found[engine] = calls[engine]().ids
        times = paired(calls, args.repeat, warm=False)
        same = sum(a == b for a, b in zip(*found.values(), strict=True))
        tokens = sum(map(len, found["continuous"]))
        batch = funcprobe.collate(prompts, found["continuous"], index)
        forward, room = plan.forward, max(plan.max_tokens, length + max(map(len, prompts)))
        stats = funcprobe.token_stats(plan.policy.params, batch, forward, room)
        check = sampler_checks.sampled_from_policy(batch, stats)
        speeds = [tokens / statistics.median(times[engine]) for engine in ENGINES]
        share = ratio(times, "continuous", "batched")
        table.append(
            [
                str(length),
                f"{tokens / len(prompts):.1f}",
                f"{same} of {len(prompts)}",
                *(f"{speed:.0f}" for speed in speeds),
                f"{share.median:.2f} ({share.low:.2f} to {share.high:.2f})",
                check.saw.rpartition("z = ")[2],
            ]
        )
        print(f"{length}: {check.saw}", flush=True)
    print_table(columns, table)


if __name__ == "__main__":
    main()
