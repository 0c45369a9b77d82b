"""What the numbers of a run depend on, for its manifest and the keys of stages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import funcprobe

from .. import store
from ..checkpoint.model import Policy
from ..config.schema import Config
from ..machine.devices import where
from ..machine.home import expanded
from ..machine.versions import versions
from ..optimizer import OptimizerReport
from ..rollouts.files import files_of
from ..sampling.prompts import Prompt
from .large_prompts import Drawn, known

_CORE, _SHELL = Path(funcprobe.__file__).parent, Path(__file__).parents[1]
_PRESENTING = ("commands", "report", "results", "sinks")


def inputs_of(
    config: Config,
    policy: Policy,
    report: OptimizerReport | None,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
) -> dict[str, Any]:
    """Hashes of the files, and what else the numbers depend on."""
    base, checkpoint = Path(policy.base), expanded(config.policy.checkpoint)
    return {
        # What determines the policy's distribution, except the temperature.
        "policy": {
            "base": store.fingerprint_path(base) if base.is_dir() else f"{base} at {policy.commit}",
            "revision": policy.revision,
            "adapter": store.fingerprint(policy.params),
            **policy.settings,
            "end_and_padding": [*policy.eos_ids, policy.pad_id],
            "mode": config.policy.mode,
            "dtype": config.policy.dtype,
            "precision": config.policy.precision,
            "attention": policy.attention,
            "device": where(policy.model),
            "versions": versions(),
            # In an editable install the code changes while the version does not.
            "code": store.fingerprint_code(_CORE, _SHELL, _PRESENTING),
        },
        "checkpoint": store.fingerprint_path(checkpoint) if checkpoint.is_dir() else str(checkpoint),
        "optimizer": store.fingerprint_path(report.path) if report else {},
        "prompts": store.fingerprint(
            [known(prompt_ids), [prompt.row for prompt in known(prompts)], *_population(prompts)]
        ),
        "rollouts": {
            key: {
                name: found
                for file in files_of(expanded(path))
                for name, found in store.fingerprint_path(file).items()
            }
            for key, path in config.rollouts
            if path is not None
        },
    }


def _population(prompts: Sequence[Prompt]) -> list[int]:
    """Of prompts of which only those that were drawn are known: how many there are."""
    return [len(prompts)] if isinstance(prompts, Drawn) else []
