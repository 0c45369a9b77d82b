"""The rules by name, and what a text such as "clip:0.2,0.28" or "mask:advantage < 0" asks for."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from ..step.objective import Advantage
from ..types import InputError
from . import bonuses, objectives, policy_terms, selections
from .grammar import nearest
from .named import BoundRule, NamedRule, Range, bind
from .rule import Rule


def rule(text: str) -> BoundRule:
    """The rule of "name" or "name:argument".

    InputError, one line: an unknown name, with the nearest; an argument that is missing or wrong.
    """
    name, colon, given = text.partition(":")
    name = name.strip()
    if name not in NAMED:
        raise InputError(f"unknown rule {nearest(name, NAMED)}")
    named = NAMED[name]
    return bind(named, given.strip() if colon else None)


def _spread(make: Callable[..., Rule]) -> Callable[[Any], Rule]:
    return lambda numbers: make(*(numbers or ()))


def _alone(make: Callable[[], Rule]) -> Callable[[Any], Rule]:
    return lambda _: make()


SHARE, OPEN, POSITIVE = Range(0, 1), Range(0, 1, open=True), Range(0, math.inf, open=True)
ANY, FROM_0 = Range(-math.inf, math.inf), Range(0, math.inf)

_CUI, _SIGNS = "Cui et al., arXiv:2505.22617", "Zhu et al., arXiv:2506.01347"
_STEER, _STARE = "STEER, arXiv:2510.10150", "STARE, arXiv:2606.19236"
_TRL = "TRL 1.16"

_RULES = (
    NamedRule(
        name="own",
        about="J as the run has it",
        equation="c, d",
        source="the run",
        make=_alone(policy_terms.own),
    ),
    NamedRule(
        name="positive_only",
        about="reinforces the responses of positive advantage and leaves out the others",
        equation="c · 1[A > 0]",
        source=f"PSR, {_SIGNS}",
        make=_alone(policy_terms.positive_only),
    ),
    NamedRule(
        name="negative_only",
        about="penalises the responses of negative advantage and leaves out the others",
        equation="c · 1[A < 0]",
        source=f"NSR, {_SIGNS}",
        make=_alone(policy_terms.negative_only),
    ),
    NamedRule(
        name="weighted_reinforce",
        about="weights the responses of positive advantage, and keeps the others whole",
        equation="c · weight, A > 0",
        source=f"Weighted-REINFORCE, {_SIGNS}",
        make=_spread(policy_terms.weighted_reinforce),
        argument="weight",
        default="0.1",
        kind="numbers",
        ranges=(FROM_0,),
    ),
    NamedRule(
        name="clip",
        about="clips the ratio to the policy that sampled below 1 - low and above 1 + high",
        equation="A r unit; 0 if r > 1 + high, A > 0, or r < 1 − low, A < 0",
        source="PPO, arXiv:1707.06347; two bounds: DAPO, arXiv:2503.14476",
        make=_spread(policy_terms.clip),
        argument="low,high",
        default="0.2,0.28",
        kind="numbers",
        ranges=(FROM_0, FROM_0),
        needs=("old_logp_NR",),
    ),
    NamedRule(
        name="clip_cov",
        about="drops tokens at random among those whose advantage and log-probability covary strongly",
        equation="A r unit · P(kept)",
        source=f"Clip-Cov, {_CUI}; verl 0.9.1",
        make=_spread(policy_terms.clip_cov),
        argument="ratio",
        default="0.0002",
        kind="numbers",
        ranges=(OPEN,),
    ),
    NamedRule(
        name="kl_cov",
        about="penalises the change of the log-probability where it covaries most with the advantage",
        equation="unit (A r − coef sign(l − l_old)) for the largest cov",
        source=f"KL-Cov, {_CUI}; verl 0.9.1",
        make=_spread(policy_terms.kl_cov),
        argument="ratio,coef",
        default="0.0002,0.1",
        kind="numbers",
        ranges=(OPEN, FROM_0),
        needs=("old_logp_NR",),
    ),
    NamedRule(
        name="top_entropy",
        about="keeps the tokens of highest entropy, a share of all",
        equation="c · 1[h ≥ quantile of h]",
        source=f"Wang et al., arXiv:2506.01939; {_TRL}, top_entropy_quantile",
        make=_spread(policy_terms.top_entropy),
        argument="share",
        default="0.2",
        kind="numbers",
        ranges=(SHARE,),
    ),
    NamedRule(
        name="steer",
        about="lowers the weight of tokens whose estimated entropy change is large",
        equation="c · exp(−k |Ω|), Ω = A / p_old · p (1 − p) (log p + h)",
        source=f"{_STEER}, exponential weights of its code",
        make=_spread(policy_terms.steer),
        argument="smallest",
        default="0.8",
        kind="numbers",
        ranges=(OPEN,),
    ),
    NamedRule(
        name="steer_linear",
        about="weights tokens between two bounds, lower where the estimated entropy change is larger",
        equation="c · w, w linear in |Ω|",
        source=f"{_STEER}, linear weights of its code",
        make=_spread(policy_terms.steer_linear),
        argument="smallest,largest",
        default="0.8,1.2",
        kind="numbers",
        ranges=(FROM_0, FROM_0),
    ),
    NamedRule(
        name="stare",
        about="raises the weight of the most surprising tokens of positive advantage",
        equation="c · raised, A > 0 and −l among the largest",
        source=f"{_STARE}, variant O1 of its code",
        make=_spread(policy_terms.stare),
        argument="raised,share",
        default="1.1,0.1",
        kind="numbers",
        ranges=(FROM_0, SHARE),
    ),
    NamedRule(
        name="stare_two_sided",
        about="does as stare, and lowers the most surprising tokens of negative advantage",
        equation="c · raised, or c · lowered, A < 0 and −l among the largest",
        source=f"{_STARE}, variant C2 of its code",
        make=_spread(policy_terms.stare_two_sided),
        argument="raised,lowered,share",
        default="1.1,0.9,0.1",
        kind="numbers",
        ranges=(FROM_0, FROM_0, SHARE),
    ),
    NamedRule(
        name="entropy_bonus",
        about="adds the entropy of U's tokens to J, with a coefficient per nat",
        equation="d + coef · unit",
        source=f"{_TRL}, entropy_coef; verl 0.9.1, entropy_coeff",
        make=_spread(bonuses.entropy_bonus),
        argument="coef",
        default="0.01",
        kind="numbers",
        ranges=(ANY,),
    ),
    NamedRule(
        name="kl_penalty",
        about="subtracts the KL divergence to the reference policy, estimated by k3",
        equation="c − coef · unit (1 − exp(l_ref − l))",
        source=f"GRPO, arXiv:2402.03300; {_TRL}, beta",
        make=_spread(partial(bonuses.kl_penalty, estimate="k3")),
        argument="coef",
        default="0.04",
        kind="numbers",
        ranges=(ANY,),
        needs=("ref_logp_NR",),
    ),
    NamedRule(
        name="kl_penalty_k2",
        about="subtracts the KL divergence to the reference policy, by k2, whose gradient is unbiased",
        equation="c − coef · unit (l − l_ref)",
        source="Schulman 2020, k2; verl 0.9.1, kl_loss_type",
        make=_spread(partial(bonuses.kl_penalty, estimate="k2")),
        argument="coef",
        default="0.04",
        kind="numbers",
        ranges=(ANY,),
        needs=("ref_logp_NR",),
    ),
    NamedRule(
        name="advantage",
        about="makes the advantages from the rewards in another way",
        equation="A unit, A of the rewards",
        source="arXiv:2402.03300 (mean_std), 2503.20783 (mean), 2402.14740 (leave_one_out)",
        make=objectives.advantage,
        argument="mode",
        kind="choice",
        choices=get_args(Advantage),
        needs=("reward_N",),
    ),
    *(
        NamedRule(
            name=name,
            about=f"advantages and normalisation of {title}",
            equation=equation,
            source=source,
            make=_alone(partial(objectives.preset, name)),
            needs=("reward_N",),
        )
        for name, title, equation, source in (
            ("grpo", "GRPO", "A / (N T_i), A = (r − mean) / (std + 1e-4)", "arXiv:2402.03300; TRL"),
            ("dapo", "DAPO", "A / Σ T, A = (r − mean) / (std + 1e-4)", "arXiv:2503.14476; TRL"),
            ("rloo", "RLOO", "A / N, A = r − mean of the others", "arXiv:2402.14740; TRL"),
        )
    ),
    NamedRule(
        name="dr_grpo",
        about="advantages and normalisation of Dr. GRPO; without L, it is the longest response of U",
        equation="A / (N L), A = r − mean",
        source="arXiv:2503.20783; TRL",
        make=_spread(partial(objectives.preset, "dr_grpo")),
        argument="L",
        kind="numbers",
        ranges=(POSITIVE,),
        needs=("reward_N",),
        optional=True,
    ),
    NamedRule(
        name="drop_prompt",
        about="leaves out the responses to a prompt",
        equation="c, d · 1[prompt ≠ index]",
        make=selections.drop_prompt,
        argument="index",
        kind="prompt index",
    ),
    NamedRule(
        name="drop_tokens",
        about="leaves out the tokens whose shares lower the predicted entropy most",
        equation="c, d · 1[not among the lowest shares]",
        make=_spread(selections.drop_tokens),
        argument="amount",
        default="0.05",
        kind="numbers",
        ranges=(POSITIVE,),
        needs=("share_NR",),
    ),
    NamedRule(
        name="random_tokens",
        about="leaves out tokens at random, the control of drop_tokens",
        equation="c, d · 1[not drawn]",
        make=_spread(selections.random_tokens),
        argument="amount,seed",
        default="0.05,0",
        kind="numbers",
        ranges=(POSITIVE, Range(0, 2**53, whole=True)),
    ),
    NamedRule(
        name="temperature",
        about="takes the log-probabilities in J at another temperature, with the same coefficients",
        equation="c, d; l and h at temperature T",
        make=_alone(policy_terms.own),
        argument="T",
        kind="numbers",
        ranges=(POSITIVE,),
        temperature=True,
    ),
    NamedRule(
        name="mask",
        about="keeps the tokens for which a condition on the columns holds",
        equation="c, d · 1[condition]",
        make=selections.weighted,
        argument="condition",
        kind="condition",
    ),
    NamedRule(
        name="weight",
        about="multiplies the tokens by a number computed from the columns",
        equation="c, d · expression",
        make=selections.weighted,
        argument="expression",
        kind="number expression",
    ),
)
NAMED: dict[str, NamedRule] = {named.name: named for named in _RULES}
"""The rules by name."""
