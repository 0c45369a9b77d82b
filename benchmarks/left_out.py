"""What leaving each prompt of U out does to the entropy: by its share, its marginal, exactly, measured.

    python benchmarks/left_out.py configs/smollm2.toml [--eta 1e-6] [--set sampling.B_E=64]

Every number is a change of d H / d eta, per unit of learning rate: minus the share (P fixed), minus the
marginal (linear in the prompt's weight), the whole step without the prompt, and the same measured by
SNIS at theta + eta v' and theta + eta v, with the standard error of their difference over the draws of
E. A share's own 95 % interval is over E, with U given. For the rules "sgd" and "precondition" the
first three are equal.
"""

import argparse
import time
from pathlib import Path

import torch

import funcprobe
from funcprobe import Step, tree
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.stages.first_order import Predicted, predicted
from funcprobe.adapters.stages.plan import load
from funcprobe.adapters.store import Stages
from funcprobe.statistics.estimators import Measured
from funcprobe.statistics.intervals import delta_error, student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], help="key=value")
    parser.add_argument("--eta", type=float, default=1e-6, help="at which changes are measured")
    args = parser.parse_args()
    narrator = Narrator()
    started = time.time()
    config = read_config(args.config, args.set)
    stages = Stages(Path(config.run.folder).expanduser() / ".stages")  # those of a run
    found = predicted(load(config, narrator), stages, narrator)
    print(f"first order after {time.time() - started:.0f} s", flush=True)
    linear(found)
    table(found, args.eta)
    print(f"{time.time() - started:.0f} s in all")


def linear(found: Predicted) -> None:
    """Under rules in which v is linear in Y: the largest difference of the change and -share."""
    plan, batches = found.plan, found.batches
    params, update = plan.policy.params, batches.update
    m = int(update.batch.prompt_N[0])
    for rule in ("sgd", "precondition"):
        left = funcprobe.leave_out(
            params,
            found.passes,
            update,
            funcprobe.subset(update, prompts=[m]),
            plan.adam_state,
            plan.forward,
            step=Step(rule),
            max_tokens=plan.max_tokens,
        )
        off = abs(left.change + left.share) / abs(left.share)
        print(f"{rule}: prompt {m}, change {left.change:.6g}, -share {-left.share:.6g}, off {off:.1e}")


def table(found: Predicted, eta: float) -> None:
    plan, batches, passes = found.plan, found.batches, found.passes
    params, update, E = plan.policy.params, batches.update, batches.eval_batch
    given = (update, plan.adam_state, plan.forward)
    common = {"step": plan.step, "max_tokens": plan.max_tokens}
    sampler = {"sampler_logp_NR": batches.sampler_logp_NR}
    columns = funcprobe.influence(
        params, passes, E, *given, route="columns", unit_N=found.unit_N, entropy=plan.entropy,
        **common, **sampler,
    )  # fmt: skip
    at = funcprobe.evaluate(E, passes.stats, plan.entropy, **sampler, baseline_NR=passes.baseline_NR)

    def measured(v: funcprobe.Params) -> Measured:
        moved = tree.axpy(eta, v, params)
        return funcprobe.change(at, funcprobe.token_stats(moved, E, plan.forward, plan.max_tokens))

    whole = measured(found.prediction.direction.total)
    print(
        f"derivative {found.prediction.derivative:.4f}, of it momentum "
        f"{found.prediction.from_momentum:.4f}, update {found.prediction.from_update:.4f}; measured "
        f"{whole.delta / eta:.4f} at eta = {eta:g}"
    )
    print("prompt    -share [95 %]                 -marginal       exact    measured +- SE")
    sums = torch.zeros(3, dtype=torch.float64)
    for m, share in zip(columns.column_M.tolist(), columns.share_M, strict=True):
        leaving = funcprobe.subset(update, prompts=[m])
        if not leaving.moves:
            print(f"{m:6}    equal rewards: no gradient")
            continue
        left = funcprobe.leave_out(params, passes, update, leaving, *given[1:], **common)
        without = measured(left.direction.total)
        influence_N = (without.influence_N - whole.influence_N) / eta
        error = delta_error(influence_N, found.unit_N)
        low, high = student(share.derivative, delta_error(share.influence_N, found.unit_N))
        print(
            f"{m:6} {-left.share:9.3f} [{-high:9.3f}, {-low:9.3f}] {-left.marginal:13.3f} "
            f"{left.change:11.3f} {(without.delta - whole.delta) / eta:11.3f} +- {error.se:.3f}",
            flush=True,
        )
        sums += torch.tensor([-left.share, -left.marginal, left.change], dtype=torch.float64)
    print(f"   sum {sums[0]:9.3f} {'':22} {sums[1]:13.3f} {sums[2]:11.3f}")


if __name__ == "__main__":
    main()
