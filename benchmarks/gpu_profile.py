"""What a pass does with a GPU's time, from torch's profiler: launches, products, copies, waits."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# By name, the first that fits. Kernels of cuBLAS and CUTLASS, of attention, copies; a CPU's operators.
KINDS = {
    "copies": re.compile(r"memcpy|memset|aten::(copy_|_to_copy)", re.IGNORECASE),
    "attention": re.compile(r"fmha|flash|attention|sdpa", re.IGNORECASE),
    "products": re.compile(
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|wgmma|splitk|aten::(mm|addmm|bmm|baddbmm)", re.IGNORECASE
    ),
}
WAITS = re.compile(r"cuda(Stream|Device|Event)Synchronize")
LAUNCHES = re.compile(r"cu(da)?LaunchKernel")


class Event(NamedTuple):
    """All calls of one name: of a kernel on the device, or of an operator or CUDA's runtime."""

    name: str
    count: int
    seconds: float  # in itself
    on_device: bool


def recorded(call: Callable[[], Any], device: str) -> list[Event]:
    """What happens in a call that is warm already."""
    on_cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as record:
        call()
        if on_cuda:
            torch.cuda.synchronize(device)
    events = []
    for e in record.key_averages():
        there = e.device_type == DeviceType.CUDA
        microseconds = e.self_device_time_total if there else e.self_cpu_time_total
        events.append(Event(e.key, e.count, microseconds / 1e6, there))
    return events


def totals(events: Sequence[Event], seconds: float) -> dict[str, Any]:
    """Cells of one row; `seconds` are what the call takes without the profiler.

    Shares are of the time that kernels ran; where none did, on a CPU, of that of its operators.
    """
    kernels = _kernels(events)
    busy = sum(e.seconds for e in kernels)
    shares = dict.fromkeys((*KINDS, "other"), 0.0)
    for e in kernels:
        shares[kind(e.name)] += e.seconds / busy if busy else 0.0
    runtime = [e for e in events if not e.on_device]
    return {
        "seconds": seconds,
        "busy": busy / seconds,
        **shares,
        "launches": sum(e.count for e in runtime if LAUNCHES.match(e.name)),
        "waits": sum(e.count for e in runtime if WAITS.match(e.name)),
        "items": sum(e.count for e in runtime if e.name == "aten::_local_scalar_dense"),
        "copies back": sum(e.count for e in events if e.on_device and "DtoH" in e.name),
    }


def longest(events: Sequence[Event], most: int) -> list[dict[str, Any]]:
    """The kernels that take most time, as rows."""
    kernels = sorted(_kernels(events), key=lambda e: -e.seconds)
    busy = sum(e.seconds for e in kernels) or 1.0
    return [
        {
            "kernel": e.name[:90],
            "kind": kind(e.name),
            "calls": e.count,
            "ms": 1e3 * e.seconds,
            "share": e.seconds / busy,
        }
        for e in kernels[:most]
    ]


def kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")


def _kernels(events: Sequence[Event]) -> list[Event]:
    there = [e for e in events if e.on_device]
    return there or [e for e in events if e.name.startswith("aten::")]
