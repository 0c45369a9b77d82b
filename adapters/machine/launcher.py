"""Whether a launcher started this process as one of several: the variables that torchrun sets."""

import os

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of accelerate launch, too


def launched() -> bool:
    """Whether this is one of several processes."""
    return all(os.environ.get(name) for name in VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def local_rank() -> int | None:
    """Which of this machine's processes this one is; None without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else None


def local_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
