"""What verl 0.9.1 is configured with, as far as its actor's loss depends on it."""

import math
from typing import Literal, NamedTuple, TypeAlias, get_args

from ..types import InputError

LossMode: TypeAlias = Literal[
    "vanilla",
    "dppo_tv",
    "dppo_kl",
    "gspo",
    "sapo",
    "gpg",
    "clip_cov",
    "kl_cov",
    "geo_mean",
    "dro",
    "cispo",
    "bypass_mode",
]
LossAggMode: TypeAlias = Literal[
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]

KL_TYPES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
POSITIVE = {
    "sapo": ("tau_pos", "tau_neg"),
    "clip_cov": ("clip_cov_ratio",),
    "kl_cov": ("kl_cov_ratio",),
    "dro": ("dro_beta",),
}
REJECTIONS = (
    *(f"token_{k}" for k in ("k1", "k2", "k3")),
    *(f"seq_{over}_{k}" for over in ("sum", "mean") for k in ("k1", "k2", "k3")),
    *(f"seq_max_{k}" for k in ("k2", "k3")),
)


class VerlLoss(NamedTuple):
    """The actor's loss of verl 0.9.1, by verl's names and with its defaults.

    The comments give the path of each in verl's configuration, where `actor` is
    `actor_rollout_ref.actor` and `correction` is `algorithm.rollout_correction`. The equations are in
    `verl_loss`.
    """

    loss_mode: LossMode = "vanilla"  # actor.policy_loss.loss_mode
    # actor.clip_ratio, used where the other two are None: verl sets those to 0.2 as well, so that
    # changing `clip_ratio` alone changes nothing.
    clip_ratio: float = 0.2
    clip_ratio_low: float | None = 0.2  # actor.clip_ratio_low
    clip_ratio_high: float | None = 0.2  # actor.clip_ratio_high
    # actor.clip_ratio_c: above 1 in vanilla (dual clip, A < 0); upper bound of the weight in dppo_*
    clip_ratio_c: float = 3.0
    loss_agg_mode: LossAggMode = "token-mean"  # actor.loss_agg_mode
    # actor.loss_scale_factor, in tokens, of seq-mean-token-sum-norm; None: the longest response of
    # every micro-batch (trainer.use_v1=true). With use_v1=false set data.max_response_length here.
    loss_scale_factor: float | None = None
    # actor.ppo_mini_batch_size * rollout.n, which the means over sequences divide by; None: the
    # number of sequences in U. They differ where U lacks rows that verl padded the mini-batch with.
    global_batch_size: int | None = None
    entropy_coeff: float = 0.0  # actor.entropy_coeff
    use_kl_loss: bool = False  # actor.use_kl_loss
    kl_loss_coef: float = 0.001  # actor.kl_loss_coef
    kl_loss_type: str = "low_var_kl"  # actor.kl_loss_type, also with "+" behind it
    tau_pos: float = 1.0  # actor.tau_pos, of sapo
    tau_neg: float = 1.05  # actor.tau_neg, of sapo
    clip_cov_ratio: float = 0.0002  # actor.policy_loss.clip_cov_ratio, share of the tokens
    clip_cov_lb: float = 1.0  # actor.policy_loss.clip_cov_lb, nats times the unit of the advantage
    clip_cov_ub: float = 5.0  # actor.policy_loss.clip_cov_ub
    kl_cov_ratio: float = 0.0002  # actor.policy_loss.kl_cov_ratio, share of the tokens
    ppo_kl_coef: float = 0.1  # actor.policy_loss.ppo_kl_coef, of kl_cov
    dro_beta: float | None = None  # actor.policy_loss.dro_beta, needed with dro
    rollout_is: Literal["token", "sequence"] | None = None  # correction.rollout_is
    # correction.rollout_is_threshold: upper bound "2.0", or "0.5_5.0": weights outside it become 0
    rollout_is_threshold: float | str = 2.0
    rollout_is_batch_normalize: bool = False  # correction.rollout_is_batch_normalize
    rollout_rs: str | None = None  # correction.rollout_rs: criteria, separated by commas
    rollout_rs_threshold: float | str | None = None  # correction.rollout_rs_threshold
    # actor.policy_loss.rollout_correction.loss_type, of bypass_mode. The fields above are then those
    # of actor.policy_loss.rollout_correction too, where verl's default of rollout_is is "sequence".
    loss_type: Literal["ppo_clip", "reinforce"] = "ppo_clip"


class Bounds(NamedTuple):
    """Of a weight, or of the statistic of a rejection criterion. lower None: no bound."""

    upper: float
    lower: float | None = None


def require_settings(settings: VerlLoss) -> None:
    """InputError for a value that verl rejects, or that makes its loss infinite."""
    for name, value in settings._asdict().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} is {value}, expected a finite number")
    _require_known("loss_mode", settings.loss_mode, get_args(LossMode))
    _require_known("loss_agg_mode", settings.loss_agg_mode, get_args(LossAggMode))
    _require_known("loss_type", settings.loss_type, ("ppo_clip", "reinforce"))
    if settings.use_kl_loss:
        known = (*KL_TYPES, *(f"{name}+" for name in KL_TYPES))
        _require_known("kl_loss_type", settings.kl_loss_type, known)
    if settings.rollout_is is not None:
        _require_known("rollout_is", settings.rollout_is, ("token", "sequence"))
        weight_bounds(settings)
    rejections(settings)
    _require_numbers(settings)


def clip_range(settings: VerlLoss) -> tuple[float, float]:
    """Clip ranges below and above: `clip_ratio` where the one asked for is None."""
    low, high = settings.clip_ratio_low, settings.clip_ratio_high
    return settings.clip_ratio if low is None else low, settings.clip_ratio if high is None else high


def weight_bounds(settings: VerlLoss) -> Bounds:
    """Bounds of the importance weights of `rollout_is`: "lower_upper", or the upper one alone."""
    return _bounds("rollout_is_threshold", str(settings.rollout_is_threshold))


def rejections(settings: VerlLoss) -> dict[str, Bounds]:
    """Bounds by criterion of `rollout_rs`, none where it is None.

    Those of k1 bound the ratio, lower = 1 / upper where it is not given; the others have an upper one
    of the divergence alone. One threshold serves all criteria. Raises InputError for what verl rejects.
    """
    if settings.rollout_rs is None:
        return {}
    criteria = list(dict.fromkeys(x.strip() for x in settings.rollout_rs.split(",") if x.strip()))
    for criterion in criteria:
        _require_known("rollout_rs", criterion, REJECTIONS)
    name, given = "rollout_rs_threshold", settings.rollout_rs_threshold
    thresholds = [] if given is None else [x.strip() for x in str(given).split(",") if x.strip()]
    if not criteria or len(thresholds) not in {1, len(criteria)}:
        raise InputError(
            f"{name} has {len(thresholds)} thresholds for {len(criteria)} criteria of rollout_rs, "
            "expected one for all or one for each, separated by commas"
        )
    if len(thresholds) == 1:
        thresholds = thresholds * len(criteria)
    found = {}
    for criterion, threshold in zip(criteria, thresholds, strict=True):
        bounds = _bounds(name, threshold)
        if criterion.endswith("k1"):
            lower = 1 / bounds.upper if bounds.lower is None else bounds.lower
            bounds = _ordered(name, threshold, Bounds(bounds.upper, lower))
        elif bounds.lower is not None:
            raise InputError(f"{name} of {criterion} is {threshold}, expected one upper bound")
        found[criterion] = bounds
    return found


def _require_numbers(settings: VerlLoss) -> None:
    mode = settings.loss_mode
    if mode == "dro" and settings.dro_beta is None:
        raise InputError('dro_beta is None, expected a positive number with loss_mode "dro"')
    for name in ("loss_scale_factor", "global_batch_size", *POSITIVE.get(mode, ())):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise InputError(f"{name} is {value:g}, expected a positive number")
    if mode == "kl_cov" and settings.kl_cov_ratio > 1:
        raise InputError(f"kl_cov_ratio is {settings.kl_cov_ratio:g}, expected at most 1, every token")
    dual_clip = mode == "vanilla" or (mode == "bypass_mode" and settings.loss_type == "ppo_clip")
    if dual_clip and settings.clip_ratio_c <= 1:
        raise InputError(
            f"clip_ratio_c is {settings.clip_ratio_c:g}, expected more than 1: it bounds the ratio "
            "from above where the advantage is negative"
        )


def _bounds(name: str, text: str) -> Bounds:
    parts = text.split("_", 1)
    try:
        numbers = [float(x) for x in parts]
    except ValueError:
        raise InputError(f'{name} is {text!r}, expected "upper" or "lower_upper", numbers') from None
    return _ordered(name, text, Bounds(numbers[-1], numbers[0] if len(numbers) == 2 else None))


def _ordered(name: str, text: str, bounds: Bounds) -> Bounds:
    lower = bounds.upper if bounds.lower is None else bounds.lower
    if not 0 < lower <= bounds.upper < math.inf:
        raise InputError(f"{name} is {text!r}, expected positive finite bounds, lower <= upper")
    return bounds


def _require_known(what: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise InputError(f"unknown {what} {found!r}: expected one of {', '.join(known)}")
