"""funcprobe: predicts and measures how the next optimizer step changes the entropy of a policy.

The functional core. Everything here is a pure function of its arguments.
"""

from .along import Passes
from .attribution.attribute import Attribution, attribute, marginal_tangents
from .attribution.evaluation_shares import EvaluationShares, Term, evaluation_shares
from .attribution.influence import Influence, Pair, influence, top_pairs
from .attribution.leave_out import LeftOut, leave_out
from .attribution.lifetime import Lifetime, later_factors, lifetime
from .attribution.module_errors import ModuleErrors, PartErrors
from .attribution.module_shares import ModuleShares, Parts, module_shares
from .attribution.momentum import (
    MomentumSince,
    MomentumSteps,
    RecomputedStep,
    moment_scale,
    momentum_by_step,
    momentum_since,
    recomputed_step,
)
from .attribution.subset import subset
from .attribution.token_shares import TokenShares, update_shares
from .losses.custom import custom_loss
from .losses.loss import Loss, LossInputs, LossReport, LossValue, loss_update
from .losses.trl import TrlLoss, trl_loss
from .losses.verl import VerlLoss, verl_loss
from .passes.grad_dots import grad_dots
from .passes.gradients import grad_X, grad_Y, unlayered, weighted_grad
from .passes.kl import KlAlong, kl_along, token_kl
from .passes.logprobs import seq_logprobs, token_stats
from .passes.second_tangents import second_tangents
from .passes.tangents import alpha_vjp, tangents
from .policy.dropout import masked_forwards
from .policy.forward import Forward, frozen_forward, lora_params, trainable_params
from .policy.layout import collate, response_mask, select
from .policy.reference import adapter_params, base_params
from .prediction import Prediction
from .probe import Probe, bind, first_order_passes, measure, predict, summarise
from .ranks import Ranks
from .rules.named import BoundRule, NamedRule
from .rules.registry import rule
from .rules.rule import RuleInputs
from .statistics.blocks import random_blocks
from .statistics.estimators import (
    entropy_value,
    first_order,
    gradient_coefficients,
    measured_change,
    update_influence,
)
from .statistics.evaluation import Evaluation, change, derivative, evaluate, second_derivative
from .statistics.observables import (
    of_response,
    of_sampled_tokens,
    of_tokens,
    response_change,
    response_derivative,
)
from .statistics.second_order import difference_eta, eta_star, second_difference, second_order
from .step.adam import fresh_adam_state, precondition, preconditioner, update_direction
from .step.evidence import Evidence, state_evidence
from .step.gradient_scale import GradientScale, gradient_scale
from .step.objective import PRESETS, Objective, advantages, coefficients, update_batch
from .step.response import response
from .types import (
    AdamGroup,
    AdamState,
    Batch,
    Entropy,
    InputError,
    Params,
    Step,
    TokenStats,
    UpdateBatch,
)

__all__ = [
    "PRESETS",
    "AdamGroup",
    "AdamState",
    "Attribution",
    "Batch",
    "BoundRule",
    "Entropy",
    "Evaluation",
    "EvaluationShares",
    "Evidence",
    "Forward",
    "GradientScale",
    "Influence",
    "InputError",
    "KlAlong",
    "LeftOut",
    "Lifetime",
    "Loss",
    "LossInputs",
    "LossReport",
    "LossValue",
    "ModuleErrors",
    "ModuleShares",
    "MomentumSince",
    "MomentumSteps",
    "NamedRule",
    "Objective",
    "Pair",
    "Params",
    "PartErrors",
    "Parts",
    "Passes",
    "Prediction",
    "Probe",
    "Ranks",
    "RecomputedStep",
    "RuleInputs",
    "Step",
    "Term",
    "TokenShares",
    "TokenStats",
    "TrlLoss",
    "UpdateBatch",
    "VerlLoss",
    "adapter_params",
    "advantages",
    "alpha_vjp",
    "attribute",
    "base_params",
    "bind",
    "change",
    "coefficients",
    "collate",
    "custom_loss",
    "derivative",
    "difference_eta",
    "entropy_value",
    "eta_star",
    "evaluate",
    "evaluation_shares",
    "first_order",
    "first_order_passes",
    "fresh_adam_state",
    "frozen_forward",
    "grad_X",
    "grad_Y",
    "grad_dots",
    "gradient_coefficients",
    "gradient_scale",
    "influence",
    "kl_along",
    "later_factors",
    "leave_out",
    "lifetime",
    "lora_params",
    "loss_update",
    "marginal_tangents",
    "masked_forwards",
    "measure",
    "measured_change",
    "module_shares",
    "moment_scale",
    "momentum_by_step",
    "momentum_since",
    "of_response",
    "of_sampled_tokens",
    "of_tokens",
    "precondition",
    "preconditioner",
    "predict",
    "random_blocks",
    "recomputed_step",
    "response",
    "response_change",
    "response_derivative",
    "response_mask",
    "rule",
    "second_derivative",
    "second_difference",
    "second_order",
    "second_tangents",
    "select",
    "seq_logprobs",
    "state_evidence",
    "subset",
    "summarise",
    "tangents",
    "token_kl",
    "token_stats",
    "top_pairs",
    "trainable_params",
    "trl_loss",
    "unlayered",
    "update_batch",
    "update_direction",
    "update_influence",
    "update_shares",
    "verl_loss",
    "weighted_grad",
]
