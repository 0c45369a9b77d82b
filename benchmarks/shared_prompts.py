"""Rows whose groups share their prompt against the same rows laid out plainly.

    python benchmarks/shared_prompts.py [--shape 0.5B] [--repeat 3] [--device cpu]

Speed-up: seconds of the plain rows over seconds of the shared ones, in one repetition. First case:
prompts of 200 tokens, 8 responses of 100 tokens to each. Then what must not lose, with three times the
repetitions: prompts that are short, and one response to a prompt. Before that, values and gradients in
float64, at the small shape.
"""

import argparse
import statistics
from functools import partial
from typing import NamedTuple

import torch
from shapes import (
    SHAPES,
    flat,
    machine,
    paired,
    peak_extra,
    policy,
    print_table,
    random_like,
    ratio,
    require_equal,
    rows,
    tokens,
    verdict,
)

import funcprobe
from funcprobe import Batch, Probe

EQUAL = 1e-10  # relative, in float64: rounding of sums in another order
NO_LOSS = 0.97  # what a median of few ratios of equal work can come to


class Case(NamedTuple):
    name: str
    prompts: int
    G: int
    P: int
    R: int
    bounds: tuple[float, ...]  # of the speed-up: forward, gradient, tangents


SHARED = (2.2, 3.0, 1.9)  # speed-up aimed at, at the 0.5B shape
CASES = (
    Case("shared", 1, 8, 200, 100, SHARED),
    Case("short prompts", 1, 8, 16, 100, (NO_LOSS,) * 3),
    Case("G = 1", 4, 1, 200, 100, (NO_LOSS,) * 3),
)
PASSES = ("forward", "gradient", "tangents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5B")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cases", choices=[c.name for c in CASES], nargs="*", help="some of them")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    agreement = _agreement(args.device)
    print(f"{args.shape} shape, float32. {machine(args.device)}")
    print(f"{args.repeat} paired ratios. In float64 shared and plain rows differ by {agreement:.1g}.")

    model = policy(args.shape, args.device)
    most = max(tokens(_rows(args.shape, case)) for case in CASES)
    shared, plain = _probes(model, max_tokens=most)  # every case is one microbatch, laid out plainly
    body = []
    for case in CASES:
        if args.cases and case.name not in args.cases:
            continue
        batch = _rows(args.shape, case)
        calls = {
            f"{layout} {name}": call
            for layout, probe in (("shared", shared), ("plain", plain))
            for name, call in _passes(probe, batch).items()
        }
        asked = case.bounds is SHARED
        memory = {name: peak_extra(call, args.device)[1] for name, call in calls.items()}  # warm now
        times = paired(calls, args.repeat * (1 if asked else 3), args.device, warm=False)
        bounds = (None,) * 3 if asked and args.shape != "0.5B" else case.bounds
        for name, bound in zip(PASSES, bounds, strict=True):
            mine, theirs = f"shared {name}", f"plain {name}"
            speed_up = ratio(times, theirs, mine)
            body.append(
                [
                    f"{case.name}: {case.prompts} x {case.G} x ({case.P} + {case.R})",
                    name,
                    str(speed_up),
                    *verdict(speed_up.median, bound, at_least=True),
                    *(f"{statistics.median(times[one]):.3g}" for one in (mine, theirs)),
                    *(f"{memory[one]:.0f}" for one in (mine, theirs)),
                ]
            )
    columns = ["prompts x G x (P + R)", "pass", "speed-up", "bound", "", "shared, s", "plain, s"]
    print_table([*columns, "shared, MiB", "plain, MiB"], body)


def _rows(shape: str, case: Case) -> Batch:
    return rows(shape, case.prompts, case.G, case.P, case.R)


def _probes(model: torch.nn.Module, max_tokens: int) -> tuple[Probe, Probe]:
    shared = funcprobe.bind(model, max_tokens=max_tokens, share_prompts=True)
    return shared, funcprobe.bind(model, max_tokens=max_tokens, share_prompts=False)


def _coefficients(batch: Batch) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shape = funcprobe.response_mask(batch).shape
    return [torch.randn(shape, generator=draw).double() for _ in "pq"]


def _passes(probe: Probe, batch: Batch) -> dict[str, partial[object]]:
    params, v = probe.params, random_like(probe.params)
    calls = (
        torch.no_grad()(partial(probe.token_stats, params, batch)),
        partial(probe.weighted_grad, params, batch, *_coefficients(batch)),
        partial(probe.tangents, params, batch, v),
    )
    return dict(zip(PASSES, calls, strict=True))


def _agreement(device: str) -> float:
    """Largest relative difference in float64 of l, h, l', h' and the gradient, over the cases."""
    model = policy("small", device, torch.float64)
    shared, plain = _probes(model, max_tokens=2400)
    found = []
    for case in CASES:
        batch = _rows("small", case)
        v = random_like(shared.params)
        results = []
        for probe in (shared, plain):
            stats = probe.token_stats(probe.params, batch)
            _, tangent = probe.tangents(probe.params, batch, v)
            grads = probe.weighted_grad(probe.params, batch, *_coefficients(batch))
            results.append((*stats, *tangent, flat(grads)))
        names = ("logp", "entropy", "logp'", "entropy'", "gradient")
        for what, a, b in zip(names, *results, strict=True):
            found.append(require_equal(f"{case.name}, {what}", a, b, EQUAL))
    return max(found)


if __name__ == "__main__":
    main()
