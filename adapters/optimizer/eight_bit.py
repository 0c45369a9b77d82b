"""bitsandbytes: Adam's moments as 8-bit codes in blocks -> exp_avg and exp_avg_sq in float32.

Its optimizers name their moments state1 and state2, under one key of the entry since 0.49.2, beside
`step` before. A tensor of min_8bit_size (4,096) elements or more is stored as uint8 codes, with a value
per code (qmap) and a scale per block (absmax); a smaller one, and any with optim_bits = 32, as float32.
Adam and AdamW share one kernel, with decoupled weight decay. Its step is torch.optim.AdamW's from the
dequantised moments, up to float32 rounding: they are quantised again only after the parameter is
updated. On CUDA the decay follows the step instead of preceding it, a relative difference of
lr * weight_decay, under 1e-6 at usual settings. (According to the source of 0.50.2.)
"""

from collections.abc import Iterable
from typing import Any

import torch

from funcprobe.types import InputError

from .saved import REMEDY, Entry, Key, Saved, some

_BLOCKS = (256, 2048)  # elements per scale; 2,048 before 0.44
_NESTED = "__bnb_optimizer_quant_state__"
_MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
_ADEMAMIX = ("alpha", "t_alpha", "t_beta3")
_CODED = {"qmap1", "qmap2", "absmax1", "absmax2"}
_KNOWN = {"step", "state1", "state2"} | _CODED


def dequantised(saved: Saved) -> Saved:
    """The same state with bitsandbytes' moments as float32 copies; unchanged if it has none.

    value = qmap[code] * absmax[block], blocks in row-major order. Raises InputError for an optimizer of
    bitsandbytes other than Adam and AdamW, for percentile_clipping and block_wise = False, and for
    codes that do not match their qmap or absmax.
    """
    entries = {key: _flat(entry) for key, entry in saved.state.items()}
    if not any(entry.keys() & {"state1", "state2"} for entry in entries.values()):
        return saved
    if other := _other(saved.groups, entries.values()):
        raise InputError(f"{other}; expected AdamW's state after a step: {REMEDY}")
    name_of = dict(_labels(saved.groups))
    state: dict[Key, Entry] = {key: _moments(entry, name_of[key]) for key, entry in entries.items()}
    coded = sum(bool(entry.keys() & _CODED) for entry in entries.values())
    note = f"bitsandbytes: moments of {coded} of {len(entries)} tensors are 8-bit, dequantised"
    if not coded:
        note = f"bitsandbytes: moments of {len(entries)} tensors, in 32 bits"
    return saved._replace(
        groups=[_group(group) for group in saved.groups],
        state=state,
        notes=(*saved.notes, note),
    )


def _group(group: dict[str, Any]) -> dict[str, Any]:
    """The group with torch's keys: no amsgrad, decoupled decay, AdEMAMix' settings (off) removed."""
    plain = {key: value for key, value in group.items() if key not in _ADEMAMIX}
    return plain | {"amsgrad": False, "decoupled_weight_decay": True}


def _flat(entry: Entry) -> Entry:
    nested = entry.get(_NESTED, {})
    if not isinstance(nested, dict) or nested.keys() & entry.keys():
        raise InputError(f"{_NESTED} is not as bitsandbytes writes it: the file is damaged")
    return {key: value for key, value in entry.items() if key != _NESTED} | nested


def _other(groups: list[dict[str, Any]], entries: Iterable[Entry]) -> str | None:
    """Why the step is not AdamW's, or None.

    The optimizers of bitsandbytes with two moments are Adam, LAMB and AdEMAMix. LAMB without max_unorm
    is Adam; with it, there is a unorm_vec. AdEMAMix has a third beta and an alpha.
    """
    keys: set[str] = set().union(*entries)
    betas = [group.get("betas") for group in groups]
    third = any(isinstance(b, (list, tuple)) and len(b) == 3 for b in betas)
    mixed = any(group.get(key) for group in groups for key in _ADEMAMIX)
    kinds = {
        "LARS (unorm_vec, no state2)": "state2" not in keys and "unorm_vec" in keys,
        "Lion, SGD, RMSprop or Adagrad (no state2)": "state2" not in keys,
        "LAMB (unorm_vec)": "unorm_vec" in keys,
        "AdEMAMix (alpha, a third beta)": third or mixed,
        "percentile_clipping, by norms of earlier gradients (gnorm_vec)": "gnorm_vec" in keys,
        "block_wise = False (max1, max2)": bool(keys & {"max1", "max2", "new_max1", "new_max2"}),
        f"unknown optimizer with {some(keys - _KNOWN)}": bool(keys - _KNOWN),
    }
    return next((f"state of bitsandbytes' {kind}" for kind, found in kinds.items() if found), None)


def _labels(groups: list[dict[str, Any]]) -> Iterable[tuple[Key, str]]:
    """Label of each key's parameter in error messages: its name, if the file has it."""
    for group in groups:
        names = group.get("param_names")
        keys = [key if isinstance(key, str) else f"position {key}" for key in group["params"]]
        labels = names if isinstance(names, list) and len(names) == len(keys) else keys
        yield from zip(group["params"], map(str, labels), strict=True)


def _moments(entry: Entry, label: str) -> Entry:
    """{exp_avg, exp_avg_sq, step}, without those that the entry lacks."""
    found: Entry = {"step": entry["step"]} if "step" in entry else {}
    for name, number in _MOMENTS.items():
        if (values := entry.get(f"state{number}")) is None:
            continue
        if not isinstance(values, torch.Tensor) or values.dtype not in (torch.uint8, torch.float32):
            raise InputError(
                f"state{number} of {label} is neither uint8 nor float32: the file is damaged"
            )
        values = values.detach().to("cpu", copy=True)
        if values.dtype is torch.uint8:
            qmap, absmax = entry.get(f"qmap{number}"), entry.get(f"absmax{number}")
            values = _values(values, qmap, absmax, number, label)
        found[name] = values
    return found


def _values(codes: torch.Tensor, qmap: Any, absmax: Any, number: str, label: str) -> torch.Tensor:
    for what, table in (("qmap", qmap), ("absmax", absmax)):
        if not isinstance(table, torch.Tensor) or table.dtype is not torch.float32 or table.ndim != 1:
            raise InputError(
                f"state{number} of {label} is 8-bit, without its {what}{number}: the file is damaged"
            )
    block_of = {-(-codes.numel() // block): block for block in _BLOCKS}
    if len(qmap) != 256 or len(absmax) not in block_of:
        raise InputError(
            f"state{number} of {label} has {codes.numel()} codes, {len(qmap)} values in qmap{number} "
            f"and {len(absmax)} in absmax{number}, expected 256 and {some(block_of)}: the file is "
            "damaged"
        )
    if not codes.is_contiguous():  # the kernels count blocks along memory
        raise InputError(
            f"state{number} of {label} is 8-bit and not contiguous, so that its blocks are ambiguous: "
            "make the parameters contiguous before the optimizer is built"
        )
    scale = absmax.cpu().repeat_interleave(block_of[len(absmax)])[: codes.numel()]
    values: torch.Tensor = qmap.cpu()[codes.flatten().int()] * scale
    return values.view(codes.shape)
