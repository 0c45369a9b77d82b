"""Types passed between the pure functions, and the legend of their shape suffixes.

Shape suffixes on tensor names:

    N  sequences            R  response positions (padded to the longest response)
    L  positions of a row   T  response tokens of a microbatch, packed
    V  vocabulary           D  hidden width
    B  prompts              G  responses per prompt
    M  sampling units (prompts, as clusters of sequences)

Statistics (`*_NR`) are float64 on the CPU, zero past the end of a response.
"""

from typing import Literal, NamedTuple, TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""The registry: name -> tensor, returned with keys sorted, accepted in any order. Names are those of
`named_parameters()`."""

Per: TypeAlias = Literal["token", "sequence"]
Integrand: TypeAlias = Literal["rao_blackwell", "sampled"]
Weights: TypeAlias = Literal["per_decision", "sequence"]
Baseline: TypeAlias = Literal["auto", "none", "entropy", "position", "ridge"]
Rule: TypeAlias = Literal["adamw", "precondition", "sgd"]


class InputError(ValueError):
    """An input is rejected: the message states what was found, what was expected, what to change."""


class Batch(NamedTuple):
    """Sequences, each a prompt followed directly by its response, right-padded.

    Under causal attention no real token attends to right padding, so that neither an attention mask
    nor position ids are needed.
    """

    tokens_NL: Int[Tensor, "N L"]
    prompt_length_N: Int[Tensor, " N"]
    response_length_N: Int[Tensor, " N"]  # T_i, the first EOS included
    prompt_N: Int[Tensor, " N"]  # index of the prompt; equal indices form one sampling unit


class UpdateBatch(NamedTuple):
    """U: sequences and the fixed coefficients of every response token in J = sum c l + d h.

    c and d are divided by sums over U's sequences, its tokens or its number of responses, which vary
    with the prompts drawn: `normaliser_N` and `entropy_normaliser_N` are what every sequence adds to
    them, up to a common factor. The gradient of J does not need them, the error over U does.
    `objective.update_batch` sets that of c, `losses.loss_update` both.
    """

    batch: Batch
    coef_NR: Float[Tensor, "N R"]  # c, of the log-probability l
    normaliser_N: Float[Tensor, " N"] | None = None  # of c; None: not known
    entropy_coef_NR: Float[Tensor, "N R"] | None = None  # d, of the entropy h; None: 0
    entropy_normaliser_N: Float[Tensor, " N"] | None = None  # of d; needed with d alone

    @property
    def moves(self) -> bool:
        """Whether some coefficient is not 0; else the gradient of J is 0."""
        d_NR = self.entropy_coef_NR
        return bool(self.coef_NR.any()) or (d_NR is not None and bool(d_NR.any()))


class TokenStats(NamedTuple):
    """Log-probability and full next-token entropy of every response token, nats.

    The same type holds their tangents (derivatives along a direction).
    """

    logp_NR: Float[Tensor, "N R"]
    entropy_NR: Float[Tensor, "N R"]


class Entropy(NamedTuple):
    """Choice of the estimator of the policy's entropy (docs/mathematics.md)."""

    per: Per = "token"
    integrand: Integrand = "rao_blackwell"
    weights: Weights = "per_decision"
    clip: float | None = None  # upper bound of the importance weights; biased, so off by default
    baseline: Baseline = "auto"  # of the score term; "auto": ridge where applicable, else none


class Step(NamedTuple):
    """How the direction v of the next parameters theta + eta v is computed (docs/mathematics.md)."""

    rule: Rule = "adamw"
    max_grad_norm: float | None = None  # gradient clipping of rule "adamw"; None: off
    max_update: float | None = None  # bound of the entries of |P Y|, rule "precondition"; None: off


class AdamGroup(NamedTuple):
    """Hyper-parameters of one optimizer group and the registry names in it."""

    names: tuple[str, ...]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class AdamState(NamedTuple):
    """Adam's state by name, with the sign of the *loss*: exp_avg averages the gradient of -J.

    `step` counts the steps taken so far. Names may be missing if the state is incomplete.
    """

    exp_avg: Params
    exp_avg_sq: Params
    step: dict[str, int]
    groups: tuple[AdamGroup, ...]


ResponseMask: TypeAlias = Bool[Tensor, "N R"]
