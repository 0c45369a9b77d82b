"""funcprobe: how the next optimizer step changes the entropy of a policy.

The functional core. Everything here is a pure function of its arguments.
"""

from .adam import fresh_adam_state, precondition, preconditioner, update_direction
from .curvature import (
    difference_eta,
    eta_star,
    second_difference,
    second_order,
    second_tangents,
)
from .estimators import (
    entropy_value,
    first_order,
    gradient_coefficients,
    measured_change,
    sum_se,
)
from .evaluation import Evaluation, change, derivative, evaluate, second_derivative
from .grad_dots import grad_dots
from .gradients import grad_X, grad_Y, weighted_grad
from .layout import collate, response_mask, select
from .logprobs import seq_logprobs, token_stats
from .objective import PRESETS, Objective, advantages, coefficients
from .policy import Forward, frozen_forward, lora_params, trainable_params
from .probe import Passes, Prediction, Probe, bind, first_order_passes, measure, predict, summarise
from .tangents import alpha_vjp, tangents
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
    "Batch",
    "Entropy",
    "Evaluation",
    "Forward",
    "InputError",
    "Objective",
    "Params",
    "Passes",
    "Prediction",
    "Probe",
    "Step",
    "TokenStats",
    "UpdateBatch",
    "advantages",
    "alpha_vjp",
    "bind",
    "change",
    "coefficients",
    "collate",
    "derivative",
    "difference_eta",
    "entropy_value",
    "eta_star",
    "evaluate",
    "first_order",
    "first_order_passes",
    "fresh_adam_state",
    "frozen_forward",
    "grad_X",
    "grad_Y",
    "grad_dots",
    "gradient_coefficients",
    "lora_params",
    "measure",
    "measured_change",
    "precondition",
    "preconditioner",
    "predict",
    "response_mask",
    "second_derivative",
    "second_difference",
    "second_order",
    "second_tangents",
    "select",
    "seq_logprobs",
    "sum_se",
    "summarise",
    "tangents",
    "token_stats",
    "trainable_params",
    "update_direction",
    "weighted_grad",
]
