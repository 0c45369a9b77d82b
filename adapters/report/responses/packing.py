"""Numbers of many tokens for the script: three significant digits in two bytes, deflated."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
DECADES = 36  # of a column: below the largest by more, a number is 0
MISSING = 0xFFFF


class Digits(NamedTuple):
    """+-DDD x 10^(exponent - 2), with 100 <= DDD <= 999, or 0: numbers as they are shown."""

    negative: npt.NDArray[np.bool_]
    digits: npt.NDArray[np.int64]
    """0 for a number that is 0 or missing."""
    exponent: npt.NDArray[np.int64]
    missing: npt.NDArray[np.bool_]

    @property
    def values(self) -> Floats:
        """The numbers that are shown; NaN: missing."""
        size = self.digits * 10.0 ** (self.exponent - 2)
        return np.where(self.missing, np.nan, np.where(self.negative, -size, size))


def three_digits(values: Floats) -> Digits:
    """Each rounded to three significant digits; not finite: missing."""
    missing = ~np.isfinite(values)
    size = np.where(missing, 0.0, np.abs(values))
    zero = size == 0
    safe = np.where(zero, 1.0, size)
    exponent = np.floor(np.log10(safe)).astype(np.int64)
    digits = _scaled(safe, exponent)
    exponent += np.where(digits > 999, 1, np.where(digits < 100, -1, 0))  # log10 rounds, too
    digits = np.clip(_scaled(safe, exponent), 100, 999)
    nothing = zero | missing
    return Digits(
        (values < 0) & ~nothing,
        np.where(nothing, 0, digits),
        np.where(nothing, 0, exponent),
        missing,
    )


def pack(columns: Mapping[str, Digits], units: Sequence[int]) -> dict[str, Any]:
    """For `data_block`: `columns` [[name, lowest exponent]], `tokens`, `packed`.

    `packed` is base64 of deflated bytes: for each column the low bytes of its codes, then the high
    ones, which are alike and deflate well; at last `units`, of each token, the same way. A code is 0
    for 0, 65535 for a missing number, else 1 + 2 ((exponent - lowest) 900 + DDD - 100) + negative.
    """
    names, parts = [], []
    for name, digits in columns.items():
        lowest, code = _codes(digits)
        names.append([name, lowest])
        parts.append(code)
    parts.append(np.minimum(np.asarray(units, dtype=np.int64), MISSING).astype("<u2"))
    halves = (half for part in parts for half in (part & 0xFF, part >> 8))
    raw = b"".join(half.astype(np.uint8).tobytes() for half in halves)
    deflate = zlib.compressobj(level=6, wbits=-zlib.MAX_WBITS)
    packed = deflate.compress(raw) + deflate.flush()
    return {"columns": names, "tokens": len(units), "packed": base64.b64encode(packed).decode()}


def _codes(shown: Digits) -> tuple[int, npt.NDArray[Any]]:
    nothing = shown.digits == 0
    top = int(shown.exponent[~nothing].max()) if not nothing.all() else 0
    lowest = top - DECADES + 1
    size = (shown.exponent - lowest) * 900 + shown.digits - 100
    code = np.where(nothing | (size < 0), 0, 1 + 2 * size + shown.negative)
    return lowest, np.where(shown.missing, MISSING, code).astype(np.uint16)


def _scaled(size: Floats, exponent: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    # Divided in two steps, as 10^(exponent - 2) alone would underflow below 1e-306.
    half = (exponent - 2) // 2
    scaled = size / 10.0**half / 10.0 ** (exponent - 2 - half)
    whole: npt.NDArray[np.int64] = np.rint(np.minimum(scaled, 1e6)).astype(np.int64)
    return whole
