"""One rank of tests/machine/test_ranks.py: what it finds is written to the folder of its argument."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from funcprobe.adapters.machine import ranks
from funcprobe.types import InputError


def refused(compute):
    try:
        compute()
    except (InputError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def fails():
    raise InputError("bad rewards")


ranks.CHUNK = 7  # so that sums are of several parts, the last one shorter
dist.init_process_group("gloo")
world = ranks.World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
generator = torch.Generator().manual_seed(world.rank)
own = [
    torch.randn(3, 4, generator=generator),
    torch.randn(9, generator=generator, dtype=torch.float64),
    torch.randn((), generator=generator),
    torch.zeros(0),
]
found = {
    "own": own,
    "sums": ranks.ranks_of().add(own),
    "again": world.ranks().add(own),
    "first": world.on_first(lambda: f"of rank {world.rank}"),
    "gathered": world.gathered(world.rank),
    "error": refused(lambda: world.on_first(fails)),
    "different": refused(lambda: world.require_same({"files": 1, "prompts": world.rank // 2})),
    "equal": refused(lambda: world.require_same({"files": 1})),
    "elsewhere": refused(lambda: world.ranks().add([torch.zeros(3 + world.rank)])),
}
torch.save(found, Path(sys.argv[1]) / f"{world.rank}.pt")
dist.destroy_process_group()
