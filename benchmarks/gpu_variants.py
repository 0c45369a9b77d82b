"""Other ways to compute a pass on a GPU, beside the one taken: three products, torch.compile."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import compiled
import torch
from gpu import Place, Report
from shapes import Shape, policy
from split_products import compared

import funcprobe

REPEAT = 3


def in_products(size: Shape, batch: funcprobe.Batch, place: Place, report: Report) -> None:
    """A forward with linear layers in one product of TF32, in three, in float32."""
    most = int((batch.prompt_length_N + batch.response_length_N).sum())
    single, double = (
        funcprobe.bind(policy(size, place.device, dtype), max_tokens=most)
        for dtype in (torch.float32, torch.float64)
    )
    for row in compared(single, double, batch, REPEAT, place.device):
        report.row("A forward, by the products of its linear layers; errors of a token, nats", **row)


def compiled_passes(size: Shape, count: int, length: int, place: Place, report: Report) -> None:
    """The forward and the gradient, each one function to torch.compile, against the same as it runs."""
    model = policy(size, place.device)
    params = funcprobe.trainable_params(model)
    draw = torch.Generator().manual_seed(0)
    tokens_NL = torch.randint(size.vocab_size, (count, length), generator=draw).to(place.device)
    for name in ("forward",) if place.tiny else ("forward", "gradient"):
        eager = partial(compiled.PASSES[name], model, params, params, tokens_NL)
        backend = "eager" if place.tiny else "inductor"  # whose compiler takes minutes on a CPU
        fast = partial(torch.compile(compiled.PASSES[name], dynamic=True, backend=backend), *eager.args)
        start = time.perf_counter()
        fast()
        first = time.perf_counter() - start
        seconds = {"eager": seconds_of(eager, place.device), "compiled": seconds_of(fast, place.device)}
        cells = {"pass": name, **seconds, "times faster": seconds["eager"] / seconds["compiled"]}
        report.row("torch.compile", **cells, **{"first call": first})


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Median of synchronized calls."""
    on_cuda = torch.device(device).type == "cuda"
    times = []
    for _ in range(REPEAT):
        if on_cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if on_cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
