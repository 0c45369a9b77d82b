"""Optimizer states as trainers write them -> Adam's state by name. One file per format."""

from .attach import OptimizerReport, live_adam_state, read_adam_state
from .formats import find_state, open_state
from .hyper import AdamOverrides
from .saved import Saved
from .sidecar import Sidecar, find_sidecar

__all__ = [
    "AdamOverrides",
    "OptimizerReport",
    "Saved",
    "Sidecar",
    "find_sidecar",
    "find_state",
    "live_adam_state",
    "open_state",
    "read_adam_state",
]
