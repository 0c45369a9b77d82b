"""What an optimizer step was made from, on disk: its gradient and the parameters before it, by name."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from funcprobe import tree
from funcprobe.types import InputError, Params

from ..machine.pointers import pointer
from ..store import save_params, write_whole

FORMAT = "funcprobe gradients 1"
FOLDER = "gradients"  # in a checkpoint: the files of the steps before it
_GRADIENT, _PARAM = "gradient/", "param/"
_NAME = re.compile(r"step-(\d{6,})\.safetensors")


class RecordedGradient(NamedTuple):
    """One optimizer step of a training."""

    step: int  # of the trainer, from 1
    gradient: Params  # of the loss, accumulated and clipped: as the optimizer was given it
    params: Params  # before the step
    moment_norm: float  # |exp_avg| before the step, over all tensors
    max_grad_norm: float | None  # None: not clipped


def gradient_path(folder: Path, step: int) -> Path:
    """The file of a step, beside its rollouts."""
    return folder / f"step-{step:06d}.safetensors"


def recorded_gradients(folder: Path) -> dict[int, Path]:
    """Step -> file, ascending; none if there is no such folder."""
    if not folder.is_dir():
        return {}
    matches = ((_NAME.fullmatch(file.name), file) for file in folder.iterdir())
    return dict(sorted((int(match[1]), file) for match, file in matches if match))


def save_gradient(found: RecordedGradient, path: Path) -> None:
    """Write one file, which appears only when whole."""
    tensors = {
        # A copy: gradients of DistributedDataParallel may be views of one buffer.
        prefix + name: tensor.detach().to("cpu", copy=True)
        for prefix, part in ((_GRADIENT, found.gradient), (_PARAM, found.params))
        for name, tensor in part.items()
    }
    metadata = {
        "format": FORMAT,
        "step": str(found.step),
        "moment_norm": repr(found.moment_norm),
        "max_grad_norm": "none" if found.max_grad_norm is None else repr(found.max_grad_norm),
    }
    write_whole(path, lambda target: save_params(tensors, target, metadata))


def load_gradient(path: Path, like: Params) -> RecordedGradient:
    """Read one file, for the registry `like`.

    Raises InputError, one line, for a file that is damaged, not of `record_rollouts`, of another step
    than its name's, of other names or shapes, or with numbers that are not finite.
    """
    if missing := pointer(path):
        raise missing
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}): copy it again, or delete it"
        ) from error
    found = _described(path, metadata)
    parts = {
        prefix: {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        for prefix in (_GRADIENT, _PARAM)
    }
    for what, part in zip(("gradient", "parameters"), parts.values(), strict=True):
        try:
            tree.require_same(like, part, f"{what} of the step")
        except ValueError as error:
            raise InputError(
                f"{path}: {error}: it is of another adapter, or a tensor had no gradient in that step"
            ) from error
        if bad := [name for name, t in part.items() if not bool(t.isfinite().all())]:
            raise InputError(
                f"{path}: the {what} of {bad[0]} are not finite in {len(bad)} of {len(part)} tensors: "
                "the training broke off there; give the gradients of a checkpoint before"
            )
    return found._replace(gradient=parts[_GRADIENT], params=parts[_PARAM])


def _described(path: Path, metadata: dict[str, str]) -> RecordedGradient:
    """The file's metadata, still without tensors."""
    if metadata.get("format") != FORMAT:
        raise InputError(
            f'{path} has format {metadata.get("format")!r:.60} in its metadata, "{FORMAT}" is '
            "expected: give the folder that record_rollouts(..., gradients=K) wrote"
        )
    try:
        step, norm = int(metadata["step"]), float(metadata["moment_norm"])
        clip = None if metadata["max_grad_norm"] == "none" else float(metadata["max_grad_norm"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} has damaged metadata ({error!r:.80}): copy it again") from error
    if not (math.isfinite(norm) and norm >= 0 and (clip is None or clip > 0)):
        raise InputError(
            f"{path} has moment_norm {norm:g} and max_grad_norm {clip} in its metadata, a norm and a "
            "positive bound are expected: copy it again"
        )
    if path.name != gradient_path(path.parent, step).name:
        raise InputError(f"{path} is of step {step} by its metadata: rename it, or copy it again")
    return RecordedGradient(step, {}, {}, norm, clip)
