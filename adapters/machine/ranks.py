"""The processes of a run, as torchrun or accelerate launch start them: sums, one process's answers.

Whatever is asked of a `World` is asked by each of its processes, in the same order. Without a launcher
there is one, and nothing of torch.distributed is imported.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from funcprobe.ranks import ALONE, Ranks
from funcprobe.types import InputError

from .launcher import local_rank
from .watch import JOINING, Watch

T = TypeVar("T")

# Who is gone is found by `watch.py`; a collective may wait as long as one process computes alone.
PATIENCE = timedelta(days=30)
ARRIVAL = 30.0  # seconds
CHUNK = 2**24  # entries that are added at once, so that a sum takes little memory beside its result


class World(NamedTuple):
    """The processes that share a run, of which this one is `rank`: a group of torch.distributed."""

    rank: int = 0
    size: int = 1
    group: Any = None  # None: one process
    store: Any = None  # of the rendezvous, which all processes of a launch share

    @property
    def first(self) -> bool:
        """Whether this one reads, writes and speaks."""
        return self.rank == 0

    def ranks(self) -> Ranks:
        """For `Forward.ranks`."""
        return ALONE if self.size == 1 else ranks_of(self.group)

    def on_first(self, compute: Callable[[], T]) -> T:
        """compute() of the first process, on all of them; its InputError, too."""
        if self.size == 1:
            return compute()
        found: Any = None
        if self.first:
            try:
                found = (compute(), None)
            except InputError as error:
                found = (None, error)
        value, rejected = self.gathered(found)[0]
        if rejected is not None:
            raise rejected
        answer: T = value
        return answer

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in rank order; any that can be pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        _require_same_place(self.group, self.size, 0)
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return values

    def in_groups(self, size: int) -> "World":
        """The one of so many consecutive processes in which this process is."""
        import torch.distributed as dist

        number = self.rank // size
        if size == 1:
            return World()
        made = [
            dist.new_group(list(range(start, start + size)), timeout=PATIENCE)
            for start in range(0, self.size, size)  # every process makes every group
        ]
        return World(self.rank % size, size, made[number], self.store)

    def next_number(self, name: str) -> int:
        """0, 1, ...: each to the first that asks for it, which is a process by itself."""
        return int(self.store.add(f"funcprobe/{name}", 1)) - 1

    def all_arrive(self, name: str) -> bool:
        """Whether all processes come here within `ARRIVAL` seconds of the first."""
        if self.size == 1:
            return True
        key, end = f"funcprobe/{name}", time.monotonic() + ARRIVAL
        self.store.add(key, 1)
        while (here := int(self.store.add(key, 0))) < self.size and time.monotonic() < end:
            time.sleep(0.1)
        return here >= self.size

    def require_same(self, what: dict[str, Any]) -> None:
        """InputError, one line, unless these values are equal on all processes; by name."""
        every = self.gathered(what)
        for name, value in every[0].items():
            other = next((r for r, found in enumerate(every) if found[name] != value), None)
            if other is not None:
                raise InputError(
                    f"ranks 0 and {other} have different {name}: start all of them with one command "
                    "line, in one environment, and where they are on several machines, give paths on a "
                    "file system that all of them see"
                )


ONE_PROCESS = World()


def join(status_of: Callable[[World], tuple[str | None, int]]) -> NoReturn:
    """status_of(world) as one of the processes that a launcher started, and the end of this one.

    status_of returns what is to be said at the end, and the exit status. All processes end with the
    first that fails, whose error alone is printed; only rank 0 prints anything else. Tensors on a CPU
    are exchanged by gloo, those on a GPU by nccl.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        limit = timedelta(seconds=JOINING)
        store, rank, size = next(rendezvous("env://", timeout=limit))
        watch = Watch(rank, size, store, os.environ["MASTER_ADDR"])
        store.set_timeout(PATIENCE)  # from here on the watch ends what waits
    except (OSError, dist.DistError) as error:
        _say_alone(error)
        sys.exit(2)
    if rank:
        silent = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 until the process ends
        sys.stdout = sys.stderr = silent

    def crashed(*error: Any) -> None:
        watch.fail(1, f"rank {rank}:\n" + "".join(traceback.format_exception(*error)))

    sys.excepthook = crashed
    device = local_rank() if torch.cuda.is_available() else None
    if device is not None and device < torch.cuda.device_count():
        torch.cuda.set_device(device)
    backend = "gloo" if device is None else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    said, status = status_of(World(rank, size, dist.group.WORLD, store))
    if status:
        watch.fail(status, said)
    watch.succeed()
    dist.destroy_process_group()
    sys.exit(0)


def _say_alone(error: Exception) -> None:
    number, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    sys.stderr.write(
        f"funcprobe: rank {number} of {size} does not find the others ({reason}): start all of them by "
        "one torchrun or accelerate launch; to run alone, unset RANK and WORLD_SIZE\n"
    )


def ranks_of(group: Any = None) -> Ranks:
    """`Ranks` of an initialised process group of torch.distributed, by default of all processes.

    For a trainer whose processes are there already (DDP): every rank of the group calls the same
    functions of the core with a forward that has them. Sums are of every rank's entries in rank order,
    by all_to_all and all_gather, so that they are bit-identical on all ranks and from run to run.
    """
    import torch.distributed as dist

    size = dist.get_world_size(group)
    if size == 1:
        return ALONE

    def add(tensors: Sequence[Tensor]) -> list[Tensor]:
        return _added(list(tensors), group, size)

    return Ranks(dist.get_rank(group), size, add)


def _added(tensors: list[Tensor], group: Any, size: int) -> list[Tensor]:
    """Sums over ranks: one bucket for the tensors of a dtype and device."""
    found: dict[int, Tensor] = {}
    kinds = dict.fromkeys((t.dtype, t.device) for t in tensors)
    for dtype, device in kinds:
        own = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == (dtype, device)]
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in own])
        _require_same_place(group, size, len(flat))
        carrier = _carrier(group, device)
        total = [_sum(part.to(carrier), group, size).to(device) for part in flat.split(CHUNK)]
        counts = [tensors[i].numel() for i in own]
        for i, part in zip(own, torch.cat(total).split(counts), strict=True):
            found[i] = part.reshape(tensors[i].shape)
    return [found[i] for i in range(len(tensors))]


def _sum(flat: Tensor, group: Any, size: int) -> Tensor:
    """Each rank adds a share of the entries, in rank order, and all have the sums then."""
    import torch.distributed as dist

    count = len(flat)
    padded = torch.nn.functional.pad(flat, (0, -count % size))
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded, group=group)
    first, *others = parts.chunk(size)
    total = first.clone()
    for part in others:
        total += part
    dist.all_gather(list(padded.chunk(size)), total, group=group)
    return padded[:count]


def _carrier(group: Any, device: torch.device) -> torch.device:
    """The device whose tensors the group takes: nccl those on a GPU, gloo those on the CPU."""
    import torch.distributed as dist

    pairs = (pair.split(":") for pair in str(dist.get_backend_config(group)).split(","))
    backend = {kind: name for kind, name in pairs if kind == "cpu" or name != "gloo"}
    if device.type in backend:
        return device
    if "cpu" in backend:
        return torch.device("cpu")
    kind = min(backend)
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _require_same_place(group: Any, size: int, entries: int) -> None:
    """RuntimeError if the ranks are at different sums, which would wait for one another forever."""
    import torch.distributed as dist

    carrier = _carrier(group, torch.device("cpu"))
    own = torch.tensor([entries], device=carrier)
    every = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(every, own, group=group)
    found = [int(one) for one in every]
    if set(found) != {entries}:
        raise RuntimeError(f"ranks are at different points of the program: they share {found} entries")
