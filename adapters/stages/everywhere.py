"""What must be the same for all processes of a run: the configuration, and the files it names."""

import re
from typing import Any

from funcprobe.types import InputError

from .. import store
from ..config.file import to_toml
from ..config.schema import Config
from ..machine.launcher import local_size
from ..machine.ranks import World

# Copies of one file on several machines have times of their own (store.fingerprint_path).
_MODIFIED = re.compile(r", modified \d+")


def require_same(config: Config, inputs: dict[str, Any], world: World) -> None:
    """InputError, one line, if processes have different settings, files or versions.

    `inputs`: hashes of what the numbers depend on, as `Plan.inputs`. All are compared but the device's
    number: each process has its own GPU.
    """
    if world.size == 1:
        return
    policy = inputs["policy"] | {"device": inputs["policy"]["device"].partition(":")[0]}
    what = {"configuration": to_toml(config)}
    what |= {f"policy ({name})": value for name, value in policy.items()}
    what |= {name: value for name, value in inputs.items() if name != "policy"}
    world.require_same({name: store.fingerprint(_without_times(value)) for name, value in what.items()})


def refuse_shared_devices(config: Config) -> None:
    """InputError for a model over all devices of a machine that several processes share."""
    if config.policy.device_map is not None and local_size() > 1:
        raise InputError(
            f"policy.device_map splits the model over this machine's devices, which {local_size()} "
            "processes would share: start one process a machine (--nproc-per-node 1)"
        )


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(one) for key, one in value.items()}
    return _MODIFIED.sub("", value) if isinstance(value, str) else value
