"""Where a run, as its optimizer_param_names.json tells, sampled or summed otherwise than the probe."""

from funcprobe.objective import PRESETS

from .config import Config
from .optimizer import Sidecar

# TRL's scale_rewards -> our advantage.
_ADVANTAGE = {"group": "mean_std", "True": "mean_std", "none": "mean", "False": "mean"}
# Settings of TRL that change which responses are in U, with the values at which they do not.
_CUTS = {"top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "repetition_penalty": (1.0,)}
# Settings of TRL that change the gradient of the loss, each with the value at which it does not.
_TERMS = {
    "beta": 0.0,
    "entropy_coef": 0.0,
    "top_entropy_quantile": 1.0,
    "num_iterations": 1,
    "mask_truncated_completions": False,
    "off_policy_mask_threshold": None,
}


def differences(config: Config, sidecar: Sidecar | None) -> list[str]:
    """A warning for each setting of the run with which its step is another than the one probed."""
    if sidecar is None:
        return []
    return [
        f"warning: the run's {line}"
        for line in (*_sampling(config, sidecar), *_objective(config, sidecar), *_loss(sidecar))
    ]


def _sampling(config: Config, sidecar: Sidecar) -> list[str]:
    ran, here = sidecar.sampling, config.sampling.temperature
    lines = []
    if ran.get("temperature") not in (None, here):
        lines.append(f"sampling had temperature {ran['temperature']}, sampling.temperature is {here:g}")
    if config.rollouts.update is None:
        lines += [
            f"sampling had {key} = {ran[key]}, and U is sampled without it here"
            for key, off in _CUTS.items()
            if ran.get(key) not in (None, *off)
        ]
    return lines


def _objective(config: Config, sidecar: Sidecar) -> list[str]:
    objective, kind, scale = config.objective, _kind(sidecar), sidecar.loss.get("scale_rewards")
    lines = []
    if kind in PRESETS and kind != objective.preset and objective.normalisation is None:
        lines.append(f"loss_type was {kind}, objective.preset is {objective.preset}")
    advantage = objective.advantage or PRESETS[objective.preset].advantage
    ran = _ADVANTAGE.get(str(scale))
    if scale is not None and advantage not in ("rollouts", ran):
        cure = f'set it to "{ran}"' if ran else "only rollouts that bring the run's own have them"
        lines.append(f"scale_rewards was {scale}, objective.advantage is {advantage}: {cure}")
    return lines


def _loss(sidecar: Sidecar) -> list[str]:
    kind, lines = _kind(sidecar), []
    if kind == "bnpo":
        lines.append(
            "loss_type was bnpo, a token mean of each micro-batch: that is the preset dapo where there "
            "is one micro-batch to a step, and no preset otherwise"
        )
    elif kind is not None and kind not in PRESETS:
        lines.append(f"loss_type was {kind}, of which no objective here is the gradient")
    return lines + [
        f"{key} was {sidecar.loss[key]}, and J here has no such term: its step is another one"
        for key, off in _TERMS.items()
        if sidecar.loss.get(key, off) not in (off, None)
    ]


def _kind(sidecar: Sidecar) -> str | None:
    kind = sidecar.loss.get("loss_type")
    return kind if isinstance(kind, str) else None
