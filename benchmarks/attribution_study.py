"""Exact shares of the predicted change against the token scores of papers, over many updates U.

    python benchmarks/attribution_study.py toy [--updates 20] [--out FILE.jsonl]
    python benchmarks/attribution_study.py real [--folder FOLDER] [--updates 20] [--out FILE.jsonl]
    python benchmarks/attribution_study.py tables FILE.jsonl

For every U: shares and marginals of its tokens, the scores, their rank correlation and signs; then the
top 5 % of tokens by each, the most entropy-lowering first, leave J (coefficients 0, divisors fixed),
the step v' is computed again as a whole, and the change at the next learning rate is predicted and
measured.

Three batches for evaluation, drawn independently, the same for all U. Shares are of E, as large as that
of a run, and of the larger L: X costs one gradient for all U. Measured is on F, so that no choice of
tokens profits from the noise of the batch that it is measured on. L and F have several responses to a
prompt, whose computation these share. A line of the file is one U, written when whole; an interrupted
study continues with the next.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from attribution_setting import SCALES, Study, prepare, with_seed
from attribution_tables import print_tables
from real_policy import FOLDER, Real, ensure_real
from scipy.stats import spearmanr
from torch import Tensor

import funcprobe
from funcprobe import Batch, Forward, Params, TokenStats, UpdateBatch, tree
from funcprobe.adapters.checkpoint.padding import as_trained
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.machine.precision import products
from funcprobe.adapters.stages.batches import Batches, sample
from funcprobe.adapters.stages.plan import Plan, load
from funcprobe.adapters.store import Stages
from funcprobe.attribution.proxies import PROXIES, tabular
from funcprobe.attribution.subset import moving_rows
from funcprobe.attribution.token_shares import update_shares
from funcprobe.passes.microbatches import per_token
from funcprobe.statistics.weights import by_unit
from funcprobe.step.adam import UpdateDirection

CONFIGS = Path(__file__).parents[1] / "configs"
DROPPED = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["toy", "real", "tables"])
    parser.add_argument("file", type=Path, nargs="?", help="of the tables")
    parser.add_argument("--updates", type=int, default=20, help="number of U")
    parser.add_argument("--out", type=Path, help="lines, one for each U")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the real policy")
    args = parser.parse_args()
    if args.what == "tables":
        return print_tables([json.loads(line) for line in args.file.read_text().splitlines()])
    out = args.out or Path(f"attribution-{args.what}.jsonl")
    done = out.read_text().splitlines() if out.is_file() else []
    settings = {"toy": lambda: [], "real": lambda: _real(ensure_real(args.folder, print))}[args.what]()
    scale = SCALES[args.what]
    plan = load(read_config(CONFIGS / f"{scale.config}.toml", settings), Narrator())
    with products(plan.config.policy.precision):
        study = prepare(plan, scale, Stages(out.parent / ".stages"))
        for seed in range(len(done), args.updates):
            start = time.perf_counter()
            row = one_update(study, seed)
            row["seconds"] = time.perf_counter() - start
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"U {seed}: {row['seconds']:.0f} s", flush=True)
    print_tables([json.loads(line) for line in out.read_text().splitlines()])


def _real(real: Real) -> list[str]:
    return [
        f"policy.checkpoint={real.checkpoint(8)}",
        f"prompts.source={real.prompts}",
        f"reward.function={real.reward}",
    ]


def one_update(study: Study, seed: int) -> dict[str, Any]:
    """Everything about the U of one seed, as it goes into the file."""
    supplied = with_seed(study.plan, seed)._replace(supplied_eval=study.drawn.eval_rollouts)
    drawn = sample(supplied, study.stages, Narrator())
    plan, update, X = study.plan, drawn.update, study.L.X
    Y = funcprobe.grad_Y(plan.policy.params, update, _over_U(plan), plan.max_tokens)
    direction = _direction(plan, Y)
    stats, exact = _exact(study, update, Y, direction)
    scores = _scores(plan, drawn, stats)
    counted_NR = update.coef_NR != 0
    count = max(1, round(DROPPED * int(counted_NR.sum())))
    chance = torch.Generator().manual_seed(seed)
    at_random = {f"random {i}": torch.rand(counted_NR.shape, generator=chance) for i in range(2)}
    orders = exact | scores | at_random
    sets = []
    for name in (*study.scale.measured, *study.scale.predicted):
        leaving_NR = _lowest(orders[name], counted_NR, count)
        rest = tree.axpy(-1.0, _gradient_of(plan, update, leaving_NR), Y)
        sums = {key: -float(exact_NR[leaving_NR].sum()) for key, exact_NR in exact.items()}
        v = _direction(plan, rest).total
        changes = _changes(study, v, measured=name in study.scale.measured)
        sets.append({"name": name, **sums, **changes})
    return {
        "seed": seed,
        "eta": plan.next_lr,
        "tokens": int(counted_NR.sum()),
        "dropped": count,
        "clip": direction.clip_coefficient,
        "parts": {
            "momentum": tree.dot(X, direction.momentum),
            "decay": tree.dot(X, direction.decay),
            "update": tree.dot(X, tree.multiply(direction.scale, Y)),
        },
        "sums": {key: float(exact_NR.sum()) for key, exact_NR in exact.items()},
        "in_top": {key: _in_top(exact_NR[counted_NR], count) for key, exact_NR in exact.items()},
        "compared": _compared(scores | exact, exact, counted_NR),
        "whole": _changes(study, direction.total),
        "sets": sets,
    }


def _direction(plan: Plan, Y: Params) -> UpdateDirection:
    step = plan.step._asdict()
    return funcprobe.update_direction(plan.policy.params, Y, plan.adam_state, **step)


def _exact(
    study: Study, update: UpdateBatch, Y: Params, direction: UpdateDirection
) -> tuple[TokenStats, dict[str, Tensor]]:
    """U's statistics; shares of E and of L, and marginals of L, [N, R], per unit of eta."""
    plan, params = study.plan, study.plan.policy.params
    step = plan.step._asdict()
    along = {
        "share": tree.multiply(direction.scale, study.E.X),
        "share of L": tree.multiply(direction.scale, study.L.X),
        "marginal of L": funcprobe.response(params, study.L.X, Y, plan.adam_state, **step),
    }
    exact = {}
    for name, mu in along.items():
        stats, slope = funcprobe.tangents(params, update.batch, mu, _over_U(plan), plan.max_tokens)
        exact[name] = update_shares(update, slope).token_NR
    return stats, exact


def _scores(plan: Plan, drawn: Batches, stats: TokenStats) -> dict[str, Tensor]:
    mask_NR = funcprobe.response_mask(drawn.update.batch)
    advantage_N = torch.tensor(drawn.update_rollouts.advantage, dtype=torch.float64)
    advantage_NR = advantage_N[:, None] * mask_NR
    scores = {name: proxy(stats, advantage_NR, mask_NR) for name, proxy in PROXIES.items()}
    expected_NR = _expected(plan, drawn.update.batch)
    return scores | {"tabular": tabular(stats, expected_NR, advantage_NR, mask_NR)}


def _compared(
    scores: dict[str, Tensor], exact: dict[str, Tensor], counted_NR: Tensor
) -> dict[str, dict[str, float]]:
    kinds = {"Spearman": _spearman, "sign": _agreement}
    return {
        name: {
            f"{kind}, {key}": compare(score_NR[counted_NR], exact_NR[counted_NR])
            for kind, compare in kinds.items()
            for key, exact_NR in exact.items()
        }
        for name, score_NR in scores.items()
    }


def _changes(study: Study, v: Params, *, measured: bool = True) -> dict[str, Any]:
    """Predicted per unit of eta on each batch, and measured on F at the next learning rate."""
    predicted = {f"predicted_{name}": tree.dot(getattr(study, name).X, v) for name in "ELF"}
    if not measured:
        return predicted
    plan, F = study.plan, study.F
    params = tree.axpy(plan.next_lr, v, plan.policy.params)
    moved = funcprobe.token_stats(params, F.batch, plan.forward, plan.max_tokens)
    found = funcprobe.change(F.at, moved)
    influence_M = by_unit(found.influence_N, F.batch.prompt_N)
    return {**predicted, "measured": found.delta, "influence": influence_M.tolist()}


def _lowest(score_NR: Tensor, counted_NR: Tensor, count: int) -> Tensor:
    """The counted tokens of the lowest scores, as a mask."""
    ordered = score_NR.masked_fill(~counted_NR, float("inf")).flatten().argsort()
    leaving = torch.zeros(counted_NR.numel(), dtype=torch.bool)
    leaving[ordered[:count]] = True
    return leaving.view(counted_NR.shape)


def _gradient_of(plan: Plan, update: UpdateBatch, leaving_NR: Tensor) -> Params:
    """Their part of Y: a gradient over the sequences that have some of them."""
    part = moving_rows(funcprobe.subset(update, tokens_NR=leaving_NR))
    return funcprobe.grad_Y(plan.policy.params, part, _over_U(plan), plan.max_tokens)


def _over_U(plan: Plan) -> Forward:
    return as_trained(plan.forward, plan.policy.padding)


def _expected(plan: Plan, batch: Batch) -> Tensor:
    """sum_i p_i^2 (h + log p_i) over the vocabulary, of every token's context, [N, R]."""
    params, forward = plan.policy.params, plan.forward

    def of_rows(rows: Any) -> tuple[Tensor]:
        with torch.no_grad():
            logp_TV = forward.logits(params, forward.hidden(params, rows)).double().log_softmax(-1)
        p_TV = logp_TV.exp()
        h_T1 = -(p_TV * logp_TV).sum(-1, keepdim=True)
        return ((p_TV.square() * (h_T1 + logp_TV)).sum(-1),)

    return per_token(of_rows, batch, plan.max_tokens, forward)[0]


def _spearman(a_T: Tensor, b_T: Tensor) -> float:
    return float(spearmanr(a_T.numpy(), b_T.numpy()).statistic)


def _agreement(a_T: Tensor, b_T: Tensor) -> float:
    return float((a_T.sign() == b_T.sign()).double().mean())


def _in_top(share_T: Tensor, count: int) -> float:
    size_T = share_T.abs().sort(descending=True).values
    return float(size_T[:count].sum() / size_T.sum())


if __name__ == "__main__":
    main()
