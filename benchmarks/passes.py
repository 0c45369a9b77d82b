"""What every pass costs, in no-grad forwards of the same rows.

    python benchmarks/passes.py [--shape small|0.5B|1.5B] [--repeat N] [--device cpu]

The forward is `token_stats`: log-probability and entropy of every response token. Rows have prompts of
their own, so that nothing is shared; half of each is response. Ratios are taken within a repetition.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from shapes import (
    SHAPES,
    machine,
    paired,
    peak_extra,
    policy,
    print_table,
    random_like,
    ratio,
    require_equal,
    rows,
    verdict,
)
from torch import Tensor

import funcprobe
from funcprobe import Params, tree

FORWARD = "forward"
BOUNDS = {  # what each pass is to stay below, in forwards
    "small": {
        "gradient": 2.3,
        "tangents": 2.6,
        "alpha_vjp": 3.5,
        "contraction": 2.4,
        "second derivative": 8.0,
    },
    "0.5B": {
        "gradient": 2.05,
        "tangents": 2.25,
        "alpha_vjp": 3.1,
        "contraction": 2.1,
        "second derivative": 6.0,
    },
}
DEFAULT_ROWS = {"small": (16, 128), "0.5B": (4, 128), "1.5B": (8, 256)}  # sequences, tokens of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--repeat", type=int, help="9 at the small shape, else 5")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, help="sequences")
    parser.add_argument("--length", type=int, help="tokens of a sequence, half of them response")
    args = parser.parse_args()
    count, length = DEFAULT_ROWS.get(args.shape, (8, 128))
    repeat = args.repeat or (9 if args.shape == "small" else 5)
    count, length = args.rows or count, args.length or length

    model = policy(args.shape, args.device)
    probe = funcprobe.bind(model, max_tokens=count * length)
    batch = rows(args.shape, prompts=count, G=1, P=length - length // 2, R=length // 2)
    v = random_like(probe.params)
    draw = torch.Generator().manual_seed(3)
    coefficients = [torch.randn(count, length // 2, generator=draw).double() for _ in "pq"]

    params, tokens_NL = probe.params, batch.tokens_NL.to(args.device)
    calls = {
        FORWARD: torch.no_grad()(partial(probe.token_stats, params, batch)),
        "forward of transformers, logits of all tokens": torch.no_grad()(partial(model, tokens_NL)),
        "gradient": partial(probe.weighted_grad, params, batch, *coefficients),
        "tangents": partial(probe.tangents, params, batch, v),
        "alpha_vjp": partial(probe.alpha_vjp, params, batch, v),
        "contraction": partial(probe.grad_dots, params, batch, v),
        "second derivative": partial(probe.second_tangents, params, batch, v),
    }
    memory, values = {}, {}
    for name, call in calls.items():
        values[name], memory[name] = peak_extra(call, args.device)
    agreement = _require_agreement(values, v, *coefficients)
    del values
    times = paired(calls, repeat, args.device, warm=False)  # the calls above were the warm-up

    print(f"{args.shape} shape, {count} rows of {length} tokens, float32. {machine(args.device)}")
    print(f"Medians (quartiles) of {repeat} paired ratios; values agree to {agreement:.1g}.")
    body = []
    for name in calls:
        cost = ratio(times, name, FORWARD)
        bound = BOUNDS.get(args.shape, {}).get(name)
        seconds = f"{statistics.median(times[name]):.3g}"
        body.append([name, str(cost), *verdict(cost.median, bound), f"{memory[name]:.0f}", seconds])
    print_table(["pass", "forwards", "bound", "", "extra memory, MiB", "seconds"], body)


def _require_agreement(values: dict[str, Any], v: Params, p_NR: Tensor, q_NR: Tensor) -> float:
    """The largest relative difference between passes that compute the same; 1e-4: float32."""
    stats, tangent = values["tangents"]
    _, first, _ = values["second derivative"]
    dots_N, grads = values["contraction"]
    along_N = tangent.logp_NR.sum(1)
    weighted = (p_NR * tangent.logp_NR + q_NR * tangent.entropy_NR).sum()
    pairs = {
        "tangents, their log-probabilities": (stats.logp_NR, values[FORWARD].logp_NR),
        "tangents, their entropies": (stats.entropy_NR, values[FORWARD].entropy_NR),
        "second tangents, their slopes": (first.logp_NR, tangent.logp_NR),
        "alpha_vjp": (values["alpha_vjp"], along_N),
        "contraction": (dots_N, along_N),
        "contraction, its gradient": (torch.tensor(tree.dot(grads, v)), along_N.sum()),
        "gradient": (torch.tensor(tree.dot(values["gradient"], v)), weighted),
    }
    return max(require_equal(what, a, b, 1e-4) for what, (a, b) in pairs.items())


if __name__ == "__main__":
    main()
