"""Who makes a step's change of the entropy, as numbers for a trainer's log and as one line."""

from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from funcprobe import tree
from funcprobe.along import Along
from funcprobe.attribution.module_shares import layer_of, module_of
from funcprobe.statistics.intervals import Interval
from funcprobe.step.adam import UpdateDirection

from ..results.digits import signed

K = TypeVar("K")
LARGEST = 1.25  # sum of absolute parts over the whole, up to which percentages are said


def causes(along: Along, direction: UpdateDirection, lr: float) -> dict[str, float]:
    """Parts of lr <X, v> by projection, the layer with the largest, and momentum's share.

    `from_projection/NAME` sum to the predicted change, by the gradient. A layer is the one of the first
    number in a module's path. Without `momentum_share` where nothing changes.
    """
    by_tensor = {n: lr * part for n, part in tree.dot_by_name(along.X, direction.total).items()}
    found = {f"from_projection/{n}": part for n, part in _summed(by_tensor, _projection).items()}
    layers = {n: p for n, p in _summed(by_tensor, _layer).items() if n is not None}
    if layers:
        top = max(layers, key=lambda n: abs(layers[n]))
        found |= {"top_layer": float(top), "from_top_layer": layers[top]}
    if along.bars_dot:
        found["momentum_share"] = along.from_momentum / along.bars_dot
    return found


def headline(logged: dict[str, float], interval: Interval) -> str:
    """The step's predicted change in per cent of the entropy, as the verdict of a run has it.

    With its interval over E, momentum against this batch, and where most of it is.
    """
    parts = {name: logged[f"from_{key}"] for name, key in _PARTS.items()}
    projections = {
        name.removeprefix("from_projection/"): part
        for name, part in logged.items()
        if name.startswith("from_projection/")
    }
    whole = sum(parts.values())
    top = max(projections, key=lambda name: abs(projections[name]))
    in_percent = 0 < sum(map(abs, parts.values())) <= LARGEST * abs(whole)
    of_parts = _said(parts, whole if in_percent else None)
    alike = 0 < sum(map(abs, projections.values())) <= LARGEST * abs(whole)
    where = _said({top: projections[top]}, whole if alike else None)
    if "top_layer" in logged:
        layer = {f"layer {logged['top_layer']:.0f}": logged["from_top_layer"]}
        # Layers may have either sign where projections have one: no layer makes more than all of it.
        inside = alike and 0 <= logged["from_top_layer"] * whole <= whole**2
        where += f", {_said(layer, whole if inside else None)}"
    scale, unit = (100 / logged["entropy"], " %") if logged["entropy"] > 0 else (1.0, "")
    change, low, high = signed(*(scale * x for x in (logged["predicted"], *interval)))
    sign = "sign not established"
    if interval.low * interval.high > 0:
        sign = "it falls" if logged["predicted"] < 0 else "it rises"
    found = f"entropy {change}{unit} by this step (95 % over E: {low} to {high}), {sign}"
    return f"{found}; {of_parts}; most in {where}"


_PARTS = {"momentum": "momentum", "this batch": "update", "weight decay": "decay"}


def _said(parts: dict[str, float], whole: float | None) -> str:
    """As percentages of the whole; as changes of the entropy without one. What is 0 is left out."""
    if whole is None:
        return ", ".join(f"{name} {part:+.1e}" for name, part in parts.items())
    return ", ".join(f"{name} {100 * part / whole:.0f} %" for name, part in parts.items() if part)


def _summed(by_tensor: dict[str, float], group_of: Callable[[str], K]) -> dict[K, float]:
    groups: defaultdict[K, float] = defaultdict(float)
    for name, part in by_tensor.items():
        groups[group_of(name)] += part
    return dict(groups)


def _projection(name: str) -> str:
    return module_of(name).rpartition(".")[2]


def _layer(name: str) -> int | None:
    last = layer_of(name).rpartition(".")[2]
    return int(last) if last.isdecimal() else None
