"""Memory of the process and of the device: peaks that can be reset, and free memory."""

import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from .allocator import release_freed_memory
from .launcher import local_size

CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_HIGH_WATER = "5"  # sets VmHWM to the current VmRSS: proc_pid_clear_refs(5), Linux 4.0
# (limit, in use) of a container: cgroup v2, then v1.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def reset_peaks() -> bool:
    """Reset the peaks. False if that of the process cannot be reset and counts from its start."""
    if torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)
    release_freed_memory()
    try:
        with CLEAR_REFS.open("w", encoding="ascii") as stream:
            stream.write(RESET_HIGH_WATER)
    except OSError:  # another operating system, or no permission
        return False
    return True


def can_measure(*devices: torch.device) -> bool:
    """Whether the peak of a pass on these devices can be measured: on GPUs, or on Linux."""
    return all(device.type == "cuda" for device in devices) or reset_peaks()


def peak_meter(*devices: torch.device) -> Callable[[], float]:
    """A function whose calls return the peak since the previous call, above the memory in use now.

    Of the device's tensors, or of the process, where freed memory is returned first: a pass that reuses
    it would seem to take none. In bytes; `can_measure(*devices)` is required. Of several devices, over
    which a model is spread, the largest of their peaks.
    """
    meters = [_meter(device) for device in devices]
    return lambda: max(meter() for meter in meters)


def _meter(device: torch.device) -> Callable[[], float]:
    held = now(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

        def of_device() -> float:
            found = torch.cuda.max_memory_allocated(device) - held
            torch.cuda.reset_peak_memory_stats(device)
            return found

        return of_device
    reset_peaks()

    def of_process() -> float:
        found = process_peak() - held
        reset_peaks()
        return found

    return of_process


def process_peak() -> int:
    """Peak memory of the process, in bytes, since the last reset, if any, else since its start."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def process_now() -> int:
    """Current memory of the process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def now(*devices: torch.device) -> int:
    """Memory in use, in bytes: of a GPU's tensors, else of the process; of several devices the most."""
    if len(devices) > 1:
        return max(now(device) for device in devices)
    (device,) = devices
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    release_freed_memory()
    return process_now()


def device_peak() -> int | None:
    """Peak memory of tensors on the GPUs, in bytes, since the last reset; None if no GPU is in use."""
    if not torch.cuda.is_initialized():
        return None
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def free(*devices: torch.device) -> int:
    """Free memory of a device, in bytes; of the CPU's, within the container's limit.

    Of several devices the least. Processes that a launcher started on this machine share the CPU's:
    each has its part.
    """
    if len(devices) > 1:
        return min(free(device) for device in devices)
    (device,) = devices
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    found = psutil.virtual_memory().available
    for limit, used in CGROUPS:
        if Path(limit).is_file() and Path(used).is_file():
            text = Path(limit).read_text(encoding="ascii").strip()
            if text != "max":
                in_use = int(Path(used).read_text(encoding="ascii")) - _page_cache(Path(used).parent)
                found = min(found, max(0, int(text) - in_use))
            break
    return int(found) // local_size()


def room_for_scores(device: torch.device) -> int | None:
    """Bytes of scores over the vocabulary that a chunk of tokens may take on a GPU; None: on the CPU.

    A share of the whole memory, not of what is free, so that one device always rounds alike.
    """
    if device.type != "cuda":
        return None
    return _share_for_scores(torch.cuda.get_device_properties(device).total_memory)


def _share_for_scores(whole: int) -> int:
    return min(max(whole // 64, 224 * 2**20), 4 * 2**30)


def _page_cache(cgroup: Path) -> int:
    """Bytes of cached files, which count as used but are released when memory is needed."""
    stat = cgroup / "memory.stat"
    lines = stat.read_text(encoding="ascii").splitlines() if stat.is_file() else []
    of = {name: int(count) for name, count in (line.split() for line in lines)}
    return of.get("total_inactive_file", of.get("inactive_file", 0))  # cgroup v1's sum, v2's
