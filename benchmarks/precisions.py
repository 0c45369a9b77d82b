"""What the named precisions cost, and what they can resolve: against float64 on the same rows.

    python benchmarks/precisions.py [--shape small|0.5B] [--layers N] [--repeat 5] [--device cpu]

Errors are relative, in the norm over all response tokens: of the tangents, and of the gradient. The
floor is the learning rate (|v| = 1) at which rounding is 10 % of the change in mean entropy, from the
noise of measured changes at two tiny learning rates and their negatives, as a run has it. A second
table has the forward with linear layers in one rounded product, as in "fast", and in three.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from shapes import (
    SHAPES,
    difference,
    flat,
    machine,
    paired,
    policy,
    print_table,
    random_like,
    ratio,
    rows,
)
from split_products import compared

import funcprobe
from funcprobe import Batch, Params, Probe
from funcprobe.adapters.machine.precision import products
from funcprobe.statistics.second_order import rounding_noise

PASSES = ("forward", "gradient", "tangents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--layers", type=int, help="fewer layers, where time is short")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="half of it response")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = shape._replace(num_hidden_layers=args.layers or shape.num_hidden_layers)
    batch = rows(shape, args.rows, G=1, P=args.length - args.length // 2, R=args.length // 2)
    max_tokens = args.rows * args.length

    single = funcprobe.bind(policy(shape, args.device), max_tokens=max_tokens)
    double = funcprobe.bind(policy(shape, args.device, torch.float64), max_tokens=max_tokens)
    # What "fast" rounds are the products alone, so that it is the same policy.
    probes = {"fast": single, "standard": single, "reference": double}
    v = random_like(double.params)
    exact = _values(double, batch, v)
    calls, body = {}, []
    for name, probe in probes.items():
        for kind, call in _passes(probe, batch, v).items():
            calls[f"{name} {kind}"] = partial(_within, name, call)
    times = paired(calls, args.repeat, args.device)
    for name, probe in probes.items():
        with products(name):
            found, floor = _values(probe, batch, v), _floor(probe, batch, v)
        errors = [f"{difference(a, b):.1g}" for a, b in zip(found, exact, strict=True)]
        cost = [str(ratio(times, f"{name} {k}", f"standard {k}")) for k in PASSES]
        body.append([name, *cost, *(errors if name != "reference" else ["", ""]), f"{floor:.1g}"])
    layers = shape.num_hidden_layers
    print(f"{args.shape} shape, {layers} layers, {max_tokens} tokens. {machine(args.device)}")
    print("Times in those of the same pass in float32, medians (quartiles).")
    kinds = [f"{kind}, time" for kind in PASSES]
    print_table(["precision", *kinds, "tangents, error", "gradient, error", "floor, eta"], body)
    print("A forward, by the products of its linear layers; errors are the largest of a token, nats.")
    found = compared(single, double, batch, args.repeat, args.device)
    print_table(list(found[0]), [list(row.values()) for row in found])


def _passes(probe: Probe, batch: Batch, v: Params) -> dict[str, Callable[[], object]]:
    ones_NR = funcprobe.response_mask(batch).double()
    params = probe.params
    passes = (
        torch.no_grad()(partial(probe.token_stats, params, batch)),
        partial(probe.weighted_grad, params, batch, ones_NR, ones_NR),
        partial(probe.tangents, params, batch, v),
    )
    return dict(zip(PASSES, passes, strict=True))


def _within(name: str, call: Callable[[], object]) -> object:
    with products(name):
        return call()


def _values(probe: Probe, batch: Batch, v: Params) -> tuple[torch.Tensor, torch.Tensor]:
    passes = _passes(probe, batch, v)
    _, tangent = passes["tangents"]()
    return torch.cat([tangent.logp_NR, tangent.entropy_NR]), flat(passes["gradient"]())


def _floor(probe: Probe, batch: Batch, v: Params) -> float:
    """10 x the noise of a measured change over the slope, at etas where the curve is linear."""
    stats, tangent = probe.tangents(probe.params, batch, v)
    at = funcprobe.evaluate(batch, stats, funcprobe.Entropy(baseline="none"))
    rms = float(tangent.logp_NR.square().mean().sqrt())
    eta = 1e3 * torch.finfo(next(iter(probe.params.values())).dtype).eps / rms
    found = {}
    for signed in (eta / 2, eta, -eta / 2, -eta):
        measured = probe.measure(probe.params, batch, v, signed, stats, entropy=at.entropy)
        found[signed] = measured.influence_N
    pairs = (found[eta / 2], found[eta]), (found[-eta / 2], found[-eta])
    noise = rounding_noise(*pairs, len(batch.prompt_N))
    unit_N = torch.arange(len(batch.prompt_N))
    return abs(10 * noise / funcprobe.derivative(at, tangent, unit_N).derivative)


if __name__ == "__main__":
    main()
