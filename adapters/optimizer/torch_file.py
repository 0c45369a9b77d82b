"""Files of torch.save, read as untrusted data: no code in them is executed."""

import errno
import pickle
import re
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from funcprobe.types import InputError

from ..machine.archives import why_not_plain
from .bounded import require_bounded
from .saved import Entry, Key, Saved, some

EXPECTED = "expected what torch.save(optimizer.state_dict()) writes"


def load_plain(path: Path | BytesIO, *, mmap: bool = False) -> Any:
    """`torch.load(weights_only=True)` on the CPU; with `mmap`, numbers stay on disk until used.

    InputError if torch.load rejects the file, or fails; and for a file that is larger in memory than on
    disk (`archives.why_not_plain`, `bounded.require_bounded`).
    """
    if why := why_not_plain(path):
        raise InputError(f"{why}; {EXPECTED}")
    if isinstance(path, BytesIO):
        path.seek(0)
    content = _loaded(path, mmap=mmap)
    require_bounded(content, path.stat().st_size if isinstance(path, Path) else len(path.getbuffer()))
    return content


def well_formed(path: Path, content: Any, format_: str) -> Saved:
    """An optimizer's state_dict, with positions or names as keys, as Saved.

    Raises InputError if it is malformed, or state and param_groups do not match.
    """
    if not isinstance(content, dict) or not {"state", "param_groups"} <= content.keys():
        named = isinstance(content, dict)
        kind = f"a dict of {some(content) or 'nothing'}" if named else type(content).__name__
        raise InputError(f"contains {kind}, without state and param_groups; {EXPECTED}")
    groups, state = content["param_groups"], content["state"]
    formed = (
        isinstance(groups, list)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        and isinstance(state, dict)
        and all(isinstance(entry, dict) for entry in state.values())
    )
    if not formed:
        raise InputError(f"state or param_groups are malformed; {EXPECTED}")
    keys: list[Key] = [key for group in groups for key in group["params"]]
    kinds = {type(key) for key in (*keys, *state)}
    if (kinds - {int} and kinds - {str}) or len(set(keys)) < len(keys) or state.keys() - set(keys):
        raise InputError(f"positions in param_groups and in state do not match; {EXPECTED}")
    entries: dict[Key, Entry] = {key: state[key] for key in keys if state.get(key)}
    return Saved(path, format_, groups, entries)


def _loaded(path: Path | BytesIO, *, mmap: bool) -> Any:
    scalar = np.float64(0).__reduce__()[0]  # in the pickle of a learning rate computed with numpy
    allowed: list[Any] = [np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except OSError as error:
        if error.errno == errno.EINVAL:  # a seek before the start of a truncated file
            raise InputError("empty or truncated: copy it again") from error
        raise InputError(f"cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        wants = re.search(r"GLOBAL (\S+)", str(error))
        why = f"requests {wants[1]:.80}, only tensors and numbers are read" if wants else "is damaged"
        raise InputError(f"not a plain torch checkpoint: it {why}; {EXPECTED}") from error
    # Raised for damaged bytes by torch's unpickler, its zip reader and its legacy reader (2.13).
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"damaged, or not a torch checkpoint; {EXPECTED}; copy the file again"
        ) from error
    except (EOFError, AssertionError, struct.error, OverflowError, MemoryError) as error:
        raise InputError("empty or truncated: copy it again") from error
