"""Several processes: whether they give what one gives, how much faster they are, how they end.

    python benchmarks/ranks.py [--sizes 1 2 3 4] [--repeat N] [--shape medium]
    python benchmarks/ranks.py --kills 10 [--processes 3]

Without a GPU: gloo, one thread a process. First the primitives in float64, at each number of processes
twice, against one process. Then, with two processes, a gradient and a pass of tangents by one of them
and by both, in turn. `--kills`: runs of the toy policy, of which one process is killed at a random
moment (SIGKILL) between its first line, when all have met, and its end, without torchrun, which would
end the others itself. (Before they have met no process knows another; a launcher does.)
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from shapes import SHAPES, machine, paired, policy, print_table, random_like, ratio, rows

import funcprobe
from funcprobe.adapters.machine.ranks import ranks_of

ROOT = Path(__file__).resolve().parents[1]
WITHIN = 30.0  # seconds in which all are to be gone
# Prompts, responses of each, tokens of a prompt and of a response.
EXACT = (7, 2, 24, 30)
TIMED = (13, 2, 64, 192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="medium")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--as-rank", choices=("exact", "speed"), help="of a process that this starts")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.as_rank:
        dist.init_process_group("gloo")
        {"exact": _exact, "speed": _speed}[args.as_rank](args)
        dist.destroy_process_group()
        return
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        if args.kills:
            kills(args.kills, args.processes, Path(folder))
        else:
            exact(args.sizes, Path(folder))
            started(2, "speed", Path(folder), "--shape", args.shape, "--repeat", str(args.repeat))


def exact(sizes: list[int], folder: Path) -> None:
    """The table of differences, in units of each result's largest entry."""
    table = []
    for size in sizes:
        for again in (1, 2):
            started(size, "exact", folder / f"{size}-{again}")
        found, repeated = (_read(folder / f"{size}-{again}") for again in (1, 2))
        alone = _read(folder / f"{sizes[0]}-1")[0]
        same = all(map(_equal, found, repeated))
        equal = all(_equal(found[0], other) for other in found)
        off = max(
            float((a - b).abs().max() / a.abs().max()) for a, b in zip(alone, found[0], strict=True)
        )
        table.append((str(size), f"{off:.1e}", "yes" if same else "NO", "yes" if equal else "NO"))
    print_table(
        ("processes", f"largest difference from {sizes[0]}", "repeats to the bit", "ranks agree"), table
    )


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _read(folder: Path) -> list[list[torch.Tensor]]:
    return [torch.load(file) for file in sorted(folder.glob("*.pt"))]


def _exact(args: argparse.Namespace) -> None:
    model = policy("small", dtype=torch.float64)
    params = funcprobe.trainable_params(model)
    forward = funcprobe.frozen_forward(model, params)._replace(ranks=ranks_of())
    batch = rows("small", *EXACT)
    v = random_like(params)
    p_NR = funcprobe.response_mask(batch).double()
    given = (forward, 256)
    found = [
        *funcprobe.weighted_grad(params, batch, p_NR, p_NR, *given).values(),
        *(x for pair in funcprobe.tangents(params, batch, v, *given) for x in pair),
        *(x for pair in funcprobe.second_tangents(params, batch, v, *given) for x in pair),
        funcprobe.grad_dots(params, batch, v, *given)[0],
        funcprobe.alpha_vjp(params, batch, v, *given),
    ]
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.save(found, args.folder / f"{dist.get_rank()}.pt")


def _speed(args: argparse.Namespace) -> None:
    """One process while the other waits, and both."""
    model = policy(args.shape)
    params = funcprobe.trainable_params(model)
    forward = funcprobe.frozen_forward(model, params)
    batch = rows(args.shape, *TIMED)
    v = random_like(params)
    p_NR = funcprobe.response_mask(batch).double()
    both, first = forward._replace(ranks=ranks_of()), dist.get_rank() == 0

    def passes(of: funcprobe.Forward) -> None:
        funcprobe.weighted_grad(params, batch, p_NR, p_NR, of)
        funcprobe.tangents(params, batch, v, of)

    def alone() -> None:
        if first:
            passes(forward)
        dist.barrier()

    times = paired({"one process": alone, "two": lambda: passes(both)}, args.repeat)
    if first:
        found = ratio(times, "one process", "two")
        print(
            f"two processes of one thread each: {found.median:.2f} times as fast as one (quartiles "
            f"{found.low:.2f} to {found.high:.2f}); load {os.getloadavg()[0]:.1f}"
        )


def started(size: int, program: str, folder: Path, *arguments: str) -> None:
    """The program of every rank; raises if one of them fails."""
    command = [__file__, "--as-rank", program, "--folder", str(folder), *arguments]
    processes = _processes(size, command)
    if any(process.wait() for process in processes):
        raise SystemExit(f"{program} at {size} processes failed")


def _processes(
    size: int, command: list[str], error: Path | None = None
) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(size):
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        of_rank |= {"OMP_NUM_THREADS": 1, "MASTER_PORT": port}
        variables = os.environ | {k: str(x) for k, x in of_rank.items()} | {"MASTER_ADDR": "127.0.0.1"}
        stream = None if error is None else error.open("ab")
        found.append(
            subprocess.Popen([sys.executable, *command], env=variables, stderr=stream, stdout=stream)
        )
    return found


def kills(count: int, size: int, folder: Path) -> None:
    """Each at a random moment of a run: seconds until the others were gone, and what was left."""
    draw, table = random.Random(0), []
    whole = _whole(size, folder)
    for i in itertools.count():
        if len(table) == count:
            break
        victim, moment = draw.randrange(size), draw.uniform(0, 0.9 * whole)
        runs, log = folder / f"runs-{i}", folder / f"log-{i}"
        processes = _processes(size, _run(runs), log)
        _first_line(log)
        time.sleep(moment)
        if processes[victim].poll() is not None:
            whole = 0.8 * whole
            continue  # it ended before: the first run was slower
        processes[victim].send_signal(signal.SIGKILL)
        start = time.monotonic()
        others = [p for r, p in enumerate(processes) if r != victim]
        while any(p.poll() is None for p in others) and time.monotonic() - start < 4 * WITHIN:
            time.sleep(0.05)
        took = time.monotonic() - start
        statuses = [p.poll() for p in others]
        for p in processes:
            p.kill()
        left = _unfinished(runs)
        lines = [x for x in log.read_text().splitlines() if "is gone" in x]
        good = took < WITHIN and all(statuses) and not left
        table.append(
            (
                f"{victim} at {moment:.1f} of {whole:.1f} s",
                f"{took:.1f} s",
                str(statuses),
                str(len(lines)),
                str(left or "none"),
            )
        )
        print(f"kill {len(table)}: {'as it must be' if good else 'NOT as it must be'}", flush=True)
        shutil.rmtree(runs, ignore_errors=True)
    print_table(("killed rank", "others gone after", "their statuses", "lines", "half written"), table)


def _whole(size: int, folder: Path) -> float:
    """Seconds of a run that nobody kills, from its first line on."""
    log = folder / "log"
    processes = _processes(size, _run(folder / "runs"), log)
    _first_line(log)
    start = time.monotonic()
    if any(p.wait() for p in processes):
        raise SystemExit(log.read_text())
    return time.monotonic() - start


def _first_line(log: Path) -> None:
    while not log.stat().st_size:
        time.sleep(0.05)


def _run(folder: Path) -> list[str]:
    small = ["--set", "sampling.B_E=128", "--set", f"run.folder={folder}"]
    return ["-m", "funcprobe", "run", str(ROOT / "configs" / "quickstart.toml"), *small]


def _unfinished(folder: Path) -> list[str]:
    """Files that are not whole: under a temporary name, or that cannot be read."""
    found = []
    for file in folder.rglob("*"):
        inside = file.relative_to(folder).parts
        if any(part.startswith(".") and part != ".stages" for part in inside):
            found.append(str(file.relative_to(folder)))
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                tensors.keys()
    run = folder / "quickstart"
    return found + (["quickstart"] if run.is_dir() and not (run / "manifest.json").is_file() else [])


if __name__ == "__main__":
    main()
