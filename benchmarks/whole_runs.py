"""Seconds and peak memory of whole runs against the size of their batches, of their rows, of the model.

    python benchmarks/whole_runs.py [--sweep B_E ...] [--shape small] [--device cpu] [--tensors]
    python benchmarks/whole_runs.py --published --device cuda

A run is `first_order_passes` and one measured point, on random rows; nothing is sampled. Each is a
fresh process, warmed up on rows too few to matter; with --repeat, sweeps follow each other and seconds
are medians, memory the largest. Peak: the process' resident memory (CUDA: allocated) at its highest
during the run; extra: the same above what was held before; with --tensors also what tensors hold of
it, by a second run under torch's profiler, for some ten thousand tokens. The second command is the
published experiment's size: Qwen2.5-1.5B's shape, B_E = 2048, B_U = 64, G = 8, 100 response tokens,
five etas.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import NamedTuple

import torch
from shapes import (
    SHAPES,
    adam_state,
    machine,
    peak_extra,
    peak_tensors,
    policy,
    print_table,
    resident_mib,
    rows,
    update_rows,
    verdict,
)

import funcprobe
from funcprobe.policy.layout import MAX_TOKENS

PLATEAU = 1.05  # the largest peak of a sweep over its first: above it memory grows with the batch
ETAS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
PUBLISHED = {"first order": 2490.0, "five measured points": 1180.0}  # seconds, in FACTS.md


class Cell(NamedTuple):
    """What one run is made of."""

    shape: str
    B_E: int = 64
    B_U: int = 8
    G: int = 4
    P: int = 16
    R: int = 16
    etas: int = 1
    device: str = "cpu"
    max_tokens: int = MAX_TOKENS
    tensors: bool = False


class Cost(NamedTuple):
    tokens: int  # of E and U, prompts counted once a response
    first_order: float  # seconds
    measured: float  # seconds of all etas
    held: float  # MiB before the run
    extra: float  # MiB at the highest, above what was held
    tensors: float  # MiB of tensors alive at the highest, above what was held; 0: not asked for

    @property
    def seconds(self) -> float:
        return self.first_order + self.measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", choices=["B_E", "B_U", "G", "length", "model"], nargs="*")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--most", type=int, help="leave out cells of more than so many tokens")
    parser.add_argument("--tensors", action="store_true", help="memory of tensors, too; on a CPU")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(run(Cell(**json.loads(args.cell)))))
        return
    base = Cell(args.shape, device=args.device, max_tokens=args.max_tokens, tensors=args.tensors)
    print(f"float32, microbatches of {args.max_tokens} tokens. {machine(args.device)}")
    if args.published:
        _published(base)
        return
    for name, cells in _sweeps(base).items():
        if args.sweep and name not in args.sweep:
            continue
        kept = {k: c for k, c in cells.items() if not args.most or _tokens(c) <= args.most}
        found = [{v: _in_fresh_process(c) for v, c in kept.items()} for _ in range(args.repeat)]
        costs = {value: _typical([costs[value] for costs in found]) for value in kept}
        _print_sweep(name, costs, next(iter(cells.values())))


def run(cell: Cell) -> Cost:
    """First order and the measured points, with their seconds and peak memory, in this process."""
    probe = funcprobe.bind(policy(cell.shape, cell.device), max_tokens=cell.max_tokens)
    state = adam_state(probe.params)
    seconds = [0.0, 0.0]

    def once(B_E: int, B_U: int, G: int, etas: int) -> None:
        batch = rows(cell.shape, B_E, 1, cell.P, cell.R)
        update = update_rows(cell.shape, B_U, G, cell.P, cell.R)
        start = _now(cell.device)
        fixed = {"forward": probe.forward, "max_tokens": cell.max_tokens}
        passes = funcprobe.first_order_passes(probe.params, batch, update, state, **fixed)
        v = funcprobe.update_direction(probe.params, passes.Y[0], state).total
        middle = _now(cell.device)
        for eta in ETAS[:etas]:
            funcprobe.measure(probe.params, batch, v, eta, passes.stats, **fixed)
        seconds[:] = [middle - start, _now(cell.device) - middle]

    once(B_E=4, B_U=1, G=2, etas=1)
    on_cuda = torch.device(cell.device).type == "cuda"
    held = torch.cuda.memory_allocated() / 2**20 if on_cuda else resident_mib("VmRSS")
    whole = partial(once, cell.B_E, cell.B_U, cell.G, cell.etas)
    _, extra = peak_extra(whole, cell.device)
    taken = tuple(seconds)
    return Cost(_tokens(cell), *taken, held, extra, peak_tensors(whole) if cell.tensors else 0.0)


def _sweeps(base: Cell) -> dict[str, dict[str, Cell]]:
    return {
        "B_E": {str(n): base._replace(B_E=n) for n in (64, 256, 1024, 4096)},
        "B_U": {str(n): base._replace(B_U=n) for n in (8, 32, 128, 512)},
        "G": {str(n): base._replace(G=n) for n in (2, 4, 8, 16, 32)},
        "length": {str(2 * n): base._replace(P=n, R=n) for n in (16, 32, 64, 128, 256)},
        "model": {
            name: base._replace(shape=name, P=32, R=32, B_E=32, B_U=2)
            for name in ("small", "medium", "large", "0.5B")
        },
    }


def _print_sweep(name: str, costs: dict[str, Cost], first: Cell) -> None:
    fixed = {k: v for k, v in first._asdict().items() if k in ("B_E", "B_U", "G", "P", "R")}
    if name == "length":
        del fixed["P"], fixed["R"]
    fixed.pop(name, None)
    where = "" if name == "model" else f"{first.shape} shape, "
    print(f"\n**{name}**: {where}{', '.join(f'{k} = {v}' for k, v in fixed.items())}")
    body = []
    for value, cost in costs.items():
        each = f"{1e3 * cost.seconds / cost.tokens:.3f}"
        peak = f"{cost.held + cost.extra:.0f}"
        cells = [value, f"{cost.tokens:,}", f"{cost.seconds:.2f}", each, peak, f"{cost.extra:.0f}"]
        cells += [f"{cost.tensors:.0f}"] if first.tensors else []
        body.append([*cells, _parameters(value)] if name == "model" else cells)
    columns = [name, "tokens", "seconds", "ms a token", "peak, MiB", "extra, MiB"]
    columns += ["tensors, MiB"] if first.tensors else []
    print_table([*columns, "parameters, millions"] if name == "model" else columns, body)
    if name == "model" or len(costs) < 3:
        return
    each = list(costs.values())
    print(_line([c.tokens for c in each], [c.seconds for c in each]))
    if name != "length":  # attention's memory grows with the rows
        for what, size in (
            ("peak", [c.held + c.extra for c in each]),
            ("extra", [c.extra for c in each]),
            ("tensors", [c.tensors for c in each]),
        ):
            if not size[0]:
                continue
            growth = max(size) / size[0]
            bound = verdict(growth, None if what == "extra" else PLATEAU)
            print(f"Largest {what} over the first: {growth:.3f} {' '.join(bound)}".rstrip())


def _line(x: list[int], y: list[float]) -> str:
    """Least squares, seconds against tokens."""
    x_C, y_C = (torch.tensor(values, dtype=torch.float64) for values in (x, y))
    slope = ((x_C - x_C.mean()) * (y_C - y_C.mean())).sum() / (x_C - x_C.mean()).square().sum()
    intercept = y_C.mean() - slope * x_C.mean()
    rest = (y_C - intercept - slope * x_C).square().sum() / (y_C - y_C.mean()).square().sum()
    return (
        f"Line: {float(intercept):.2f} s + {1e3 * float(slope):.3f} ms a token, "
        f"R² {1 - float(rest):.5f}."
    )


def _published(base: Cell) -> None:
    cell = base._replace(shape="1.5B", B_E=2048, B_U=64, G=8, P=150, R=100, etas=len(ETAS))
    cost = _in_fresh_process(cell)
    print(f"{cell}: {cost.tokens:,} tokens, peak {cost.held + cost.extra:,.0f} MiB.")
    body = [
        [what, f"{seconds:.1f}", f"{published:,.0f}", f"{published / seconds:.1f}"]
        for (what, published), seconds in zip(
            PUBLISHED.items(), (cost.first_order, cost.measured), strict=True
        )
    ]
    print_table(["stage", "seconds", "published, seconds", "times faster"], body)


def _in_fresh_process(cell: Cell) -> Cost:
    command = [sys.executable, __file__, "--cell", json.dumps(cell._asdict())]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{cell} failed:\n{done.stderr}")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def _typical(costs: list[Cost]) -> Cost:
    seconds = (statistics.median(c[i] for c in costs) for i in (1, 2))
    return Cost(costs[0].tokens, *seconds, *(max(c[i] for c in costs) for i in (3, 4, 5)))


def _tokens(cell: Cell) -> int:
    return (cell.B_E + cell.B_U * cell.G) * (cell.P + cell.R)


def _parameters(shape: str) -> str:
    with torch.device("meta"):
        model = policy(shape, "meta")
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}"


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
