"""The steps of gpu.py, each called in a process of its own."""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import whole_runs
from gpu import Place, Report
from gpu_profile import longest, recorded, totals
from gpu_variants import compiled_passes, in_products, seconds_of
from peft import PeftModel
from shapes import SHAPES, Shape, machine, peak_extra, policy, random_like, rows

import funcprobe
from funcprobe import tree
from funcprobe.adapters.machine.precision import products, rounded

Step: TypeAlias = Callable[[Place, Report], None]

ROOT = Path(__file__).parents[1]
TINY = Shape(64, 2, 4, 2, 128, 512)
LONG = ("forward", "gradient", "tangents", "contraction")
PRECISIONS = ("float32", "TF32", "bfloat16 base")
REPEAT = 3
EIGHTH = 8


def tests(place: Place, report: Report) -> None:
    """Each test is a row as soon as it ended."""
    report.machine(_machine(place))
    command = [sys.executable, "-P", "-m", "pytest", "--device", place.device, "-m", "device"]
    command += [str(ROOT / "tests" / name) for name in ("test_device.py", "test_device_waits.py")]
    command += ["-o", "addopts=", "-W", "ignore", "-vv"]
    command += ["-p", "no:cacheprovider", "--tb=short", "--color=no"]
    command += ["-k", "test_statistics"] if place.tiny else []  # the suite has them all
    ended = re.compile(r"test_device\w*\.py::(\S+) (PASSED|FAILED|ERROR|SKIPPED)")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    count = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    for line in process.stdout:
        print(line, end="", flush=True)
        if (seen := ended.search(line)) is None:
            continue
        count[seen[2].lower()] += 1
        report.content["tables"]["Tests of -m device"] = []
        report.row("Tests of -m device", **count)
        if seen[2] in {"FAILED", "ERROR"}:
            report.row("Tests that failed", test=seen[1], how=seen[2].lower())
    if status := process.wait():
        sys.exit(status)


def passes(
    shape: str,
    tokens: int,
    place: Place,
    report: Report,
    long: int | None = None,
) -> None:
    """Seconds of every pass and its ratio to the forward, by precision and length of a sequence.

    Sequences have prompts of their own and are of one length, half of it response. The forward is
    token_stats. Seconds are medians of synchronized calls after one that is not counted; memory is what
    that one took above what was held. Under each length, |<X, v> - sum of tangents| / |<X, v>|. `long`:
    tokens of a last microbatch of one sequence, and of four of a quarter of its length.
    """
    report.machine(_machine(place))
    size = TINY if place.tiny else SHAPES[shape]
    lengths, tokens = ((12, 24), 96) if place.tiny else ((300, 2048), tokens)
    model = policy(size, place.device)
    if long:
        longest = 64 if place.tiny else long
        for length in (longest // 4, longest):
            _measure_passes(model, size, "float32", longest // length, length, place, report, LONG)
    for precision in PRECISIONS:
        if precision == "bfloat16 base":
            _halve_base(model)
        fast = "fast" if precision == "TF32" else None
        with products(fast):
            for length in lengths:
                _measure_passes(model, size, precision, tokens // length, length, place, report)


def _measure_passes(
    model: PeftModel,
    size: Shape,
    precision: str,
    count: int,
    length: int,
    place: Place,
    report: Report,
    names: Sequence[str] = (),
) -> None:
    halved: list[int] = []
    probe = funcprobe.bind(model)
    forward = rounded(probe.forward, "fast" if precision == "TF32" else None)
    fixed = {"forward": forward._replace(halved=halved.append), "max_tokens": count * length}
    batch = rows(size, prompts=count, G=1, P=length - length // 2, R=length // 2)
    p_NR, v = funcprobe.response_mask(batch).double(), random_like(probe.params)
    q_NR, params = torch.zeros_like(p_NR), probe.params
    calls: dict[str, Callable[[], Any]] = {
        "forward": partial(funcprobe.token_stats, params, batch, **fixed),
        "gradient": partial(funcprobe.weighted_grad, params, batch, p_NR, q_NR, **fixed),
        "tangents": partial(funcprobe.tangents, params, batch, v, **fixed),
        "alpha trick": partial(funcprobe.alpha_vjp, params, batch, v, **fixed),
        "contraction": partial(funcprobe.grad_dots, params, batch, v, **fixed),
        "second tangents": partial(funcprobe.second_tangents, params, batch, v, **fixed),
    }
    of_forward = reverse = None
    for name, call in calls.items():
        if names and name not in names:
            continue
        cells: dict[str, Any] = {"precision": precision, "tokens a sequence": length, "pass": name}
        keys = ("seconds", "forwards", "tokens a second", "extra memory, MiB", "note")
        cells |= dict.fromkeys(keys)
        halved.clear()
        if torch.device(place.device).type == "cuda":
            torch.cuda.empty_cache()  # of what another pass had
        try:
            value, extra = peak_extra(call, place.device)
            if halved:  # so that no call begins with what does not fit
                call = partial(call, max_tokens=halved[-1])  # noqa: PLW2901
            seconds = seconds_of(call, place.device)
        except (RuntimeError, ValueError, MemoryError) as error:  # refused, or torch has no such kernel
            report.row("Passes", **cells | {"note": f"{type(error).__name__}: {error}"})
            continue
        of_forward = seconds if name == "forward" else of_forward
        note = f"memory ran out: {halved[-1]:,} tokens a microbatch" if halved else None
        if name == "gradient":
            reverse = tree.dot(value, v)
        if name == "tangents" and reverse:
            along = float(value[1].logp_NR.sum())
            report.row(
                "Reverse route against forward route",
                **{"precision": precision, "tokens a sequence": length},
                difference=abs(along - reverse) / abs(reverse),
            )
        cells |= {"seconds": seconds, "extra memory, MiB": extra, "note": note}
        cells |= {"forwards": seconds / of_forward if of_forward else None}
        report.row("Passes", **cells | {"tokens a second": count * length / seconds})


def quickstart(place: Place, report: Report) -> None:
    """As configs/quickstart.toml has it, in float64 and then in float32; the toy is made first."""
    from funcprobe.adapters import run as shell
    from funcprobe.adapters.config.file import read_config
    from funcprobe.adapters.console import Narrator

    report.machine(_machine(place))
    folder = Path(tempfile.mkdtemp())
    few = ["sampling.B_E=64", "sampling.B_U=8", "sampling.G=4"] if place.tiny else []
    try:
        for dtype in ("float64", "float32"):
            changes = {"policy.dtype": dtype, "run.device": place.device, "run.folder": folder}
            settings = [f'{key}="{value}"' for key, value in changes.items()]
            config = read_config(ROOT / "configs" / "quickstart.toml", [*settings, *few])
            start = time.perf_counter()
            results, _ = shell.run(config, Narrator())
            _quickstart_rows(dtype, results, time.perf_counter() - start, report)
    finally:
        shutil.rmtree(folder)


def _quickstart_rows(dtype: str, results: Any, seconds: float, report: Report) -> None:
    cost, checks = results.cost, results.checks
    passed = sum(check.passed for check in checks)
    failed = [check.name for check in checks if not check.passed and not check.advisory]
    peak = cost.total.device_peak_bytes
    report.row(
        "Quickstart",
        dtype=dtype,
        seconds=seconds,
        entropy=results.entropy.value,
        derivative=results.first_order.derivative.value,
        checks=f"{passed} of {len(checks)}" + (f", not {', '.join(failed)}" if failed else ""),
        **{"device's peak, MiB": None if peak is None else peak / 2**20},
    )
    for point in results.sweep:
        report.row(
            "Its sweep",
            dtype=dtype,
            eta=f"{point.eta:g}",
            predicted=f"{point.predicted.value:.4e}",
            measured=f"{point.measured.value:.4e}",
            ratio=f"{point.ratio.value:.7f}",
        )
    for stage in cost.stages:
        report.row("Its stages", dtype=dtype, stage=stage.stage, seconds=stage.seconds)
    if failed:
        raise SystemExit(f"quickstart in {dtype}: checks failed: {', '.join(failed)}")


def published(place: Place, report: Report) -> None:
    """An eighth of `whole_runs.py --published`, and of its sampling, which those seconds exclude."""
    report.machine(_machine(place))
    etas = len(whole_runs.ETAS)
    cell = whole_runs.Cell("1.5B", 2048 // EIGHTH, 64 // EIGHTH, 8, 150, 100, etas, max_tokens=16_384)
    if place.tiny:
        cell = cell._replace(shape="small", B_E=16, B_U=2, G=2, P=8, R=8)
    for precision in PRECISIONS[:2]:
        with products("fast" if precision == "TF32" else None):
            cost = whole_runs.run(cell._replace(device=place.device))
            parts = {"first order": cost.first_order, "five measured points": cost.measured}
            parts["sampling E and U"] = _seconds_of_sampling(cell, place)
        parts["all of it (goal: 200)"] = sum(parts.values())
        for what, seconds in parts.items():
            before = whole_runs.PUBLISHED.get(what)
            report.row(
                "Qwen2.5-1.5B's shape, random weights, B_E = 2048, B_U = 64, G = 8, five etas",
                precision=precision,
                part=what,
                **{
                    "an eighth, seconds": seconds,
                    "the whole, seconds": EIGHTH * seconds,
                    "published, seconds": before,
                    "times faster": None if before is None else before / (EIGHTH * seconds),
                    "peak, MiB": cost.held + cost.extra,
                },
            )


def _seconds_of_sampling(cell: whole_runs.Cell, place: Place) -> float:
    """Of all responses of the cell, of full length, as a run samples them."""
    from funcprobe.adapters.checkpoint.model import Policy
    from funcprobe.adapters.config.batches import SamplingConfig
    from funcprobe.adapters.sampling.generate import sample_responses

    model = policy(cell.shape, place.device)
    one = Policy(model, None, funcprobe.trainable_params(model), (0,), 0, "", None, "sdpa", ())
    count = cell.B_E + cell.B_U * cell.G
    prompts = torch.randint(1, SHAPES[cell.shape].vocab_size, (count, cell.P)).tolist()
    config = SamplingConfig(max_new_tokens=cell.R)
    start = time.perf_counter()
    sample_responses(one, prompts, config, seed=0)
    return time.perf_counter() - start


def profiled(place: Place, report: Report) -> None:
    """One microbatch each of gradient and tangents, at 0.5B's shape and 300 tokens a sequence.

    Then other ways to compute one: linear layers in three products, torch.compile.
    """
    report.machine(_machine(place))
    size, count, length = (TINY, 8, 12) if place.tiny else (SHAPES["0.5B"], 27, 300)
    model = policy(size, place.device)
    for precision in ("float32", "bfloat16 base"):
        if precision == "bfloat16 base":
            _halve_base(model)
        probe = funcprobe.bind(model, max_tokens=count * length)
        batch = rows(size, prompts=count, G=1, P=length - length // 2, R=length // 2)
        p_NR, v = funcprobe.response_mask(batch).double(), random_like(probe.params)
        calls: dict[str, Callable[[], Any]] = {
            "gradient": partial(probe.weighted_grad, probe.params, batch, p_NR, p_NR),
            "tangents": partial(probe.tangents, probe.params, batch, v),
        }
        for name, call in calls.items():
            _, extra = peak_extra(call, place.device)
            seconds = seconds_of(call, place.device)
            events = recorded(call, place.device)
            what = {"precision": precision, "pass": name}
            found = totals(events, seconds) | {"extra memory, MiB": extra}
            report.row("One microbatch", **what, **found)
            for kernel in longest(events, most=10):
                report.row("Kernels that take most time", **what, **kernel)
    in_products(size, batch, place, report)
    compiled_passes(size, count, length, place, report)


def _halve_base(model: PeftModel) -> None:
    """As a run has it: the base in bfloat16, the adapter in float32."""
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(torch.bfloat16)


def _machine(place: Place) -> str:
    line = machine(place.device)
    if torch.device(place.device).type != "cuda":
        return line
    free, whole = torch.cuda.mem_get_info(place.device)
    return f"{line}; CUDA {torch.version.cuda}, {free / 2**30:.0f} of {whole / 2**30:.0f} GiB free"


STEPS: dict[str, Step] = {
    "tests": tests,
    "passes-0.5B": partial(passes, "0.5B", 8192, long=16_384),
    "quickstart": quickstart,
    "published": published,
    "profile": profiled,
    "passes-1.5B": partial(passes, "1.5B", 4096),
}
