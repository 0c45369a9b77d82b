"""What results.json holds beside the sweep: settings, sizes, first order, norms, checks."""

from pydantic import JsonValue

from .quantity import Quantity, Section, StudentInterval


class EntropySettings(Section):
    """The entropy estimator; see `entropy` in the configuration."""

    per: str
    """token or sequence: what the entropy is divided by."""
    integrand: str
    """rao_blackwell: entropy of the full next-token distribution; sampled: minus log-probability."""
    weights: str
    """Importance weights per_decision (prefix) or of the whole sequence."""
    clip: float | None
    """Largest importance weight; null: no clip."""
    baseline: str
    """Control variate of the score term."""


class StepSettings(Section):
    """The rule of the optimizer step."""

    rule: str
    """adamw, precondition or sgd."""
    max_grad_norm: float | None
    """Gradient norm at which the step clips; null: no clipping."""
    max_update: float | None
    """Bound of the entries of |P Y| with the rule "precondition"; null: none."""


class ObjectiveSettings(Section):
    """J = sum of advantage x normalisation x log-probability over the tokens of U."""

    advantage: str
    """How rewards become advantages."""
    normalisation: str
    """What the sum over tokens is divided by; "of the loss" where objective.loss is set."""
    constant: float
    """L of the normalisation "constant", tokens."""


class Conventions(Section):
    """Signs, normalisation and settings that every number rests on."""

    sign: str
    """Sign of changes and directions."""
    entropy: EntropySettings
    """The entropy estimator."""
    step: StepSettings
    """The rule of the optimizer step."""
    objective: ObjectiveSettings
    """The objective J of U."""
    temperature: float
    """Sampling temperature of E and U; logits are divided by it."""
    dtype: str
    """policy.dtype: the type in which the model computes."""
    precision: str
    """policy.precision."""
    max_tokens: int
    """Tokens in a microbatch, padding included."""
    se: str
    """Sampling units of standard errors."""
    interval: str
    """Level and construction of intervals."""
    names: str
    """Symbols used in `normalised_by`."""


class LossSection(Section):
    """The loss of U at theta, to be minimised, and what its trainer logs beside it."""

    name: str
    """preset: minus J of conventions.objective; trl, verl, or the function of objective.loss."""
    settings: dict[str, JsonValue]
    """Of the loss, by the trainer's names, with the defaults; empty for a preset."""
    at_theta: Quantity
    """The loss of the optimizer step, as logged at this step."""
    reference: str | None
    """Where the reference policy's log-probabilities are from; null: the loss has none."""
    metrics: dict[str, float | None]
    """By the trainer's names: entropy, kl, the share of tokens clipped, and others; null: not finite,
    as a mean over sequences without a token in the loss."""
    divisor_residual: float
    """Of one's own loss: how far the others' coefficients change without a prompt, beside a common
    factor and relative to them; the error over U leaves it out. 0 where the divisors are known."""


class Counts(Section):
    """Sizes of E, U and the adapter."""

    E_sequences: int
    """Responses of E."""
    E_prompts: int
    """Distinct prompts of E."""
    E_tokens: int
    """Response tokens of E, first EOS included."""
    U_sequences: int
    """Responses of U."""
    U_prompts: int
    """Prompts of U, one group each."""
    U_tokens: int
    """Response tokens of U, first EOS included."""
    U_groups_without_gradient: int
    """Groups of U whose advantages are all 0."""
    trainable_parameters: int
    """Entries of all trainable tensors."""


class Masks(Section):
    """<X, v_k>, the derivative along the step by the gradient of dropout mask k, over the masks."""

    count: int
    """Masks, step.masks; Y, v and P are means over them."""
    spread: Quantity
    """Standard deviation of <X, v_k> over the masks, U given."""
    se_one_step: Quantity
    """Of the derivative along the step that is taken, with one mask: spread sqrt(1 + 1 / count)."""
    interval_one_step: StudentInterval
    """Of that derivative, over masks alone: E and U given."""
    interval_given_U: StudentInterval
    """Of that derivative, over masks and the draws of E: for a U that is the trainer's own."""


class FirstOrder(Section):
    """d/d eta of the entropy along v at eta = 0, per unit of learning rate."""

    derivative: Quantity
    """By tangents (forward mode); the prediction is eta times it."""
    bars_dot: Quantity
    """The same number by the gradient, <X, v>."""
    bars_dot_identity: Quantity
    """<X, Y>: the derivative along the raw gradient, without Adam."""
    from_update: Quantity
    """<X, P Y>: the part of this batch's gradient."""
    from_momentum: Quantity
    """<X, v_momentum>: the part of Adam's first moment."""
    from_weight_decay: Quantity
    """<X, v_decay>: the part of decoupled weight decay. The three parts sum to the derivative."""
    se_given_U: Quantity
    """Standard error over the draws of E, v held fixed (delta method)."""
    se_given_U_jackknife: Quantity
    """The same by the delete-one jackknife: a cross-check."""
    se_over_U: Quantity
    """Standard error over the prompts of U, the second moment in P held fixed."""
    se_total: Quantity
    """Root of the sum of the squares of se_given_U, se_over_U and, with masks, se_one_step."""
    interval_given_U: StudentInterval
    """Of the derivative, over the draws of E, v held fixed."""
    interval_over_U: StudentInterval
    """Of the derivative, over the prompts of U, the second moment in P held fixed."""
    interval_total: StudentInterval
    """Of the derivative along the step of an average U, over the draws of E, the prompts of U and, with
    masks, those of one step."""
    interval_next_U: StudentInterval
    """Along the step of another U of this size, as the trainer's next batch: over U counts twice."""
    masks: Masks | None
    """null: the gradient Y is without dropout."""


class Norms(Section):
    """Euclidean norms over all trainable tensors."""

    X: Quantity
    """Gradient of the entropy estimator on E."""
    Y: Quantity
    """Gradient of the objective on U, before clipping."""
    v: Quantity
    """Direction of the step."""


class SecondMoments(Section):
    """What the saved second moments do to a gradient, P = 1 / (sqrt(nu_hat) + eps)."""

    coverage: float
    """Share of tensors whose exp_avg_sq was used."""
    identity: tuple[str, ...]
    """Tensors left as the raw gradient: second moment missing, all zero, negative or not finite."""
    max_scale: float | None
    """Largest entry of P."""
    min_denominator: float | None
    """Smallest sqrt(nu_hat) + eps."""
    zero_second_moments: int
    """Entries with nu_hat = 0."""
    tiny_second_moments: int
    """Entries with 0 < nu_hat < eps^2, where eps dominates the denominator."""
    without_step: tuple[str, ...]
    """Tensors used without bias correction, their step being missing or 0."""
    zero_outputs: int
    """Entries of v that are exactly 0."""
    gradient_ratio: float | None
    """Median over tensors of sqrt(mean Y^2 / mean nu_hat), Y clipped: about 1 if U is as large as a
    batch of the training run; null: no second moments."""
    gradient_beyond_ten: float
    """Share of entries with |Y| > 10 sqrt(nu_hat)."""
    below_eps: float
    """Share of entries with sqrt(nu_hat) < eps, where eps dominates the denominator."""


class StateEvidence(Section):
    """Whether the gradient on U fits the second moments filed under the same names."""

    verdict: str
    """confirmed, contradicted or undecided, at odds of 1000."""
    parameters: int
    """Tensors that share their shape with another."""
    at_home: int
    """Of these, paired with their own second moments in the assignment of the largest likelihood."""
    log_odds_over_random: float
    """Logarithm (nats) of the odds of the names over a random order."""
    log_odds_over_nearest: float | None
    """The same over the likeliest of the other orders that are considered; null: there is none."""
    nearest_order: str | None
    """That order."""
    margin: dict[str, float]
    """Tensor -> log-likelihood of its gradient by its own second moments minus that by the best other,
    nats per entry."""


class CheckResult(Section):
    """One sanity check."""

    name: str
    """What is checked."""
    passed: bool
    """Whether what was found meets what is required."""
    saw: str
    """What was found."""
    bound: str
    """What was required."""
    failure_means: str
    """The usual cause of a failure."""
    advisory: bool
    """Whether a failure is a hint only."""
