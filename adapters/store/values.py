"""Numbers and parameters as files hold them."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from funcprobe.types import InputError, Params


def require_finite(value: Any, where: str) -> None:
    """InputError for a number in `value` that is not finite, with its place and the keys to check."""
    if isinstance(value, dict):
        eta = value.get("eta")
        place = f" at eta = {eta:g}" if type(eta) in (int, float) else ""
        for key, item in value.items():
            require_finite(item, f"{where}{place}, {key}")
    elif isinstance(value, list):
        for item in value:
            require_finite(item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(
            f"{where}, is {value}, a finite number is expected: overflow or underflow occurred, check "
            "measure.etas, optimizer.lr, optimizer.weight_decay and sampling.temperature"
        )


def write_json(value: Any, path: Path) -> None:
    """JSON with a final newline; NaN and infinity are rejected, since JSON has neither."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def save_params(params: Params, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write parameters by name, in safetensors format, with `metadata` in its header."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in params.items()}, path, metadata)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
