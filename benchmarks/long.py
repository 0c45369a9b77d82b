"""Passes over one long sequence: time in forwards of the same row, and memory.

    python benchmarks/long.py [--shape small|0.5B|135M] [--tokens 4096] [--passes forward tangents ...]
    python benchmarks/long.py --shape 0.5B --repetitions 0   # where a pass takes minutes

The forward is `token_stats`; all of the sequence but its prompt (--prompt, 256 tokens) is response, so
that the head computes log-probability and entropy of tokens - prompt positions. Ratios are taken within
a repetition. Memory is what the process takes at its highest above what it held, in a call of its own
before the repetitions; with none of these, that call is timed, and the forward again after it. Those
that recompute keep the inputs of layers alone and compute these again, as
a run does by itself where a sequence would not fit. `135M` is a saved base with random LoRA: --base, by
default the one that `python benchmarks/real_policy.py` makes.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from real_policy import FOLDER, Real
from shapes import (
    SHAPES,
    Times,
    machine,
    paired,
    peak_extra,
    policy,
    print_table,
    random_like,
    ratio,
    require_equal,
    verdict,
    with_lora,
)
from transformers import AutoModelForCausalLM

import funcprobe
from funcprobe import tree

FORWARD = "forward"
AGAIN = "-recomputed"
PASSES = (
    *(FORWARD, "tangents", "second", "gradient", "contraction"),
    *(f"gradient{AGAIN}", f"contraction{AGAIN}"),
)
REAL = "135M"


class Bounds(NamedTuple):
    """What a pass is to stay below; None: nothing is asked."""

    forwards: float | None = None
    memory: float | None = None  # GiB
    relative: float | None = None  # memory, in that of the forward


AT_4096 = {
    "tangents": Bounds(2.8, relative=1.5),
    "second": Bounds(6.0),
    "gradient": Bounds(2.6),
    "contraction": Bounds(2.7),
}
LONGER = {"tangents": Bounds(memory=4.0), f"gradient{AGAIN}": Bounds(3.6, memory=6.0)}
BOUNDS = {
    ("small", 4096): AT_4096,
    ("0.5B", 4096): AT_4096,
    ("small", 16384): LONGER,
    (REAL, 8192): LONGER,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*sorted(SHAPES), REAL], default="small")
    parser.add_argument("--tokens", type=int, default=4096, help="of the sequence")
    parser.add_argument("--prompt", type=int, default=256, help="how many of them are prompt")
    parser.add_argument("--passes", choices=PASSES, nargs="+", default=list(PASSES))
    parser.add_argument(
        "--repetitions", type=int, default=3, help="0: each pass once, by its first call"
    )
    parser.add_argument("--base", type=Path, default=Real(FOLDER.expanduser()).base)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    model = _real(args.base, args.device) if args.shape == REAL else policy(args.shape, args.device)
    probe = funcprobe.bind(model, max_tokens=args.tokens)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (args.tokens,), generator=draw).tolist()
    batch = funcprobe.collate([ids[: args.prompt]], [ids[args.prompt :]], [0])
    v = random_like(probe.params)
    p_NR, q_NR = torch.randn(2, 1, args.tokens - args.prompt, generator=draw).double()

    params, again = probe.params, probe.forward._replace(recompute=True)
    every = {
        FORWARD: torch.no_grad()(partial(probe.token_stats, params, batch)),
        "tangents": partial(probe.tangents, params, batch, v),
        "second": partial(probe.second_tangents, params, batch, v),
        "gradient": partial(probe.weighted_grad, params, batch, p_NR, q_NR),
        "contraction": partial(probe.grad_dots, params, batch, v),
        f"gradient{AGAIN}": partial(
            funcprobe.weighted_grad, params, batch, p_NR, q_NR, again, args.tokens
        ),
        f"contraction{AGAIN}": partial(funcprobe.grad_dots, params, batch, v, again, args.tokens),
    }
    calls = {name: every[name] for name in PASSES if name in (FORWARD, *args.passes)}
    values: dict[str, Any] = {}
    memory: dict[str, float] = {}  # GiB
    times: Times = {}
    for name, call in calls.items():
        start = time.perf_counter()
        values[name], mib = peak_extra(call, args.device)
        times[name] = [time.perf_counter() - start]
        memory[name] = mib / 1024
    agreement = _require_agreement(values, v, p_NR, q_NR)
    del values
    if args.repetitions:  # warm from the calls above
        times = paired(calls, args.repetitions, args.device, warm=False)
    else:
        times |= paired({FORWARD: calls[FORWARD]}, 1, args.device, warm=False)

    print(
        f"{args.shape} shape, one sequence of {args.tokens} tokens, {args.prompt} of them prompt, "
        f"float32. {machine(args.device)}"
    )
    paired_ratios = f"Medians (quartiles) of {args.repetitions} paired ratios"
    print(f"{paired_ratios if args.repetitions else 'Each pass once'}; {agreement}.")
    bounds = BOUNDS.get((args.shape, args.tokens), {})
    body = []
    for name in calls:
        bound, cost = bounds.get(name, Bounds()), ratio(times, name, FORWARD)
        relative = memory[name] / memory[FORWARD]
        most = (
            verdict(memory[name], bound.memory) if bound.memory else verdict(relative, bound.relative)
        )
        most[0] += " GiB" if bound.memory else " forwards' memory" if bound.relative else ""
        seconds = f"{statistics.median(times[name]):.3g}"
        of_memory = [f"{memory[name]:.2f}", f"{relative:.2f}", *most]
        body.append([name, str(cost), *verdict(cost.median, bound.forwards), *of_memory, seconds])
    columns = ["forwards", "bound", "", "memory, GiB", "of the forward's", "bound", "", "seconds"]
    print_table(["pass", *columns], body)


def _real(base: Path, device: str) -> Any:
    if not (base / "config.json").exists():
        raise SystemExit(f"{base} is no saved model: give --base, or run benchmarks/real_policy.py")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    return with_lora(model).eval()


def _require_agreement(
    values: dict[str, Any], v: funcprobe.Params, p_NR: torch.Tensor, q_NR: torch.Tensor
) -> str:
    """That passes agree on what they compute both, to 1e-4: float32."""
    if "tangents" not in values:
        return "values are not compared"
    stats, tangent = values["tangents"]
    forward = values[FORWARD]
    if not torch.equal(stats.logp_NR, forward.logp_NR):
        raise SystemExit("the log-probabilities of tangents are not the forward's to the bit")
    pairs = {}
    if "second" in values:
        pairs["second"] = (values["second"][1].logp_NR, tangent.logp_NR)
    weighted = (p_NR * tangent.logp_NR + q_NR * tangent.entropy_NR).sum()
    for name, value in values.items():
        if name.startswith("contraction"):
            pairs[name] = (value[0], tangent.logp_NR.sum(1))
        if name.startswith("gradient"):
            pairs[name] = (torch.tensor(tree.dot(value, v)), weighted)
    most = max((require_equal(what, a, b, 1e-3) for what, (a, b) in pairs.items()), default=0.0)
    return f"values agree to {most:.1g}, those of tangents are the forward's to the bit"


if __name__ == "__main__":
    main()
