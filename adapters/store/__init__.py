"""Files that appear only when whole, stored results of stages, fingerprints of what both depend on."""

from .cache import Stored, bound, clear, stored
from .fingerprints import fingerprint, fingerprint_code, fingerprint_path
from .leases import FOLDER, lease
from .places import require_place, require_writable
from .sealed import seal, write_sealed
from .stages import Stages
from .values import require_finite, save_params, write_json
from .whole import run_folder, whole_folder, write_whole

__all__ = [
    "FOLDER",
    "Stages",
    "Stored",
    "bound",
    "clear",
    "fingerprint",
    "fingerprint_code",
    "fingerprint_path",
    "lease",
    "require_finite",
    "require_place",
    "require_writable",
    "run_folder",
    "save_params",
    "seal",
    "stored",
    "whole_folder",
    "write_json",
    "write_sealed",
    "write_whole",
]
