"""Whether a whatif.json beside a run folder is of that run, by what both files record."""

from collections.abc import Mapping
from typing import Any

from ..store import fingerprint
from .manifest import Inputs, Manifest
from .schema import Results
from .whatif_sections import WhatIf

OF_BOTH = ("checkpoint", "optimizer", "prompts", "rollouts")
SETTINGS = ("entropy", "step", "objective", "temperature", "dtype", "precision")
ENTROPY = 1e-5  # relative; the same computation on another machine differs by less
DERIVATIVE = 1e-3  # relative to itself or its standard error, since parts of it cancel


def inputs_of(seed: int, inputs: Mapping[str, Any]) -> dict[str, str]:
    """The seed, and a hash of each of the inputs that a run and its rules have in common.

    Not of the policy: it holds versions and the device, which change numbers by their rounding alone.
    """
    return {"seed": str(seed), **{name: fingerprint(inputs[name]) for name in OF_BOTH}}


def why_not_of(whatif: WhatIf, results: Results, manifest: Manifest) -> str | None:
    """The first thing in which the two are of different runs, in words; None: they are of one.

    Sizes, settings, inputs (of files that record them), the learning rate of the next step, entropy,
    and derivative along the run's own step. Rules at a learning rate of one's own are of the run, too.
    """
    here, there = results.counts.model_dump(), whatif.counts.model_dump()
    for name, found in there.items():
        if found != here[name]:
            return f"{name} is {found}, of this run {here[name]}"
    for name in SETTINGS:
        ours, theirs = getattr(results.conventions, name), getattr(whatif.conventions, name)
        if ours != theirs:
            return f"{name} is {_said(theirs)}, of this run {_said(ours)}"
    own = inputs_of(manifest.seed, _plain(manifest.inputs))
    for name, found in (whatif.inputs or {}).items():
        if found != own.get(name):
            what = f"{found}, of this run {own[name]}" if name == "seed" else "another"
            return f"{name} is {what}"
    return _other_numbers(whatif, results)


def _other_numbers(whatif: WhatIf, results: Results) -> str | None:
    first, derivative = results.first_order, results.first_order.derivative.value
    eta, next_lr = whatif.learning_rate.value, results.next_lr.value
    if whatif.is_next_lr and abs(eta - next_lr) > 1e-9 * next_lr:
        return f"the next step's learning rate is {eta:g}, of this run {next_lr:g}"
    there, here = whatif.entropy.value, results.entropy.value
    if abs(there - here) > ENTROPY * abs(here):
        return f"the entropy is {there:.6g}, of this run {here:.6g}"
    slope = whatif.rules[0].entropy.predicted.value / eta
    if abs(slope - derivative) > DERIVATIVE * max(abs(derivative), first.se_given_U.value):
        return f"its own rule has derivative {slope:.4g}, this run {derivative:.4g}"
    return None


def _said(value: Any) -> str:
    if not hasattr(value, "model_dump"):
        return str(value)
    return ", ".join(f"{name} = {x}" for name, x in value.model_dump().items())


def _plain(inputs: Inputs) -> dict[str, Any]:
    return inputs.model_dump(mode="json")
