"""Inside a running trainer of transformers or TRL: parameter names, the probe, recorded rollouts."""

from .names import ParamNamesCallback
from .probe import ProbeCallback
from .recording import record_rollouts

__all__ = ["ParamNamesCallback", "ProbeCallback", "record_rollouts"]
