"""Code that a run executes beside its own: what names it, and where it lies."""

import importlib.util

from ..config.schema import Config
from ..machine.home import expanded


def code_lines(config: Config) -> list[str]:
    """A line for each function of the user's that is imported and called, and for remote code."""
    named = {"objective.loss": config.objective.loss}
    if config.rollouts.update is None or config.measure.observables is not None:
        named["reward.function"] = config.reward.function
    named |= {f"measure.observables, {name}": name for name in config.measure.observables or ()}
    lines = []
    for key, spec in named.items():
        module, colon, function = (spec or "").rpartition(":")
        if colon:
            lines.append(f"runs code: {function} of {_place(module)} ({key})")
    if config.policy.trust_remote_code:
        base = config.policy.base or config.policy.checkpoint
        lines.append(f"runs code: that of the model, as of {base} (policy.trust_remote_code)")
    return lines


def _place(module: str) -> str:
    """The file; the module's name where that is not known before it is imported."""
    if module.endswith(".py"):
        return str(expanded(module).absolute())
    if "." in module:  # its parents would be imported
        return f"the module {module}"
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    return str(found.origin) if found is not None and found.origin else f"the module {module}"
