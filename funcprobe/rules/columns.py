"""The columns that expressions over the tokens of U may name."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .rule import RuleInputs, required


class Column(NamedTuple):
    """Of every token of U. `needs`: an optional field of RuleInputs that it is of."""

    about: str
    unit: str
    values: Callable[[RuleInputs], Tensor]
    needs: str | None = None


def _of_sequence(x_N: Tensor, inputs: RuleInputs) -> Tensor:
    return x_N[:, None].expand(inputs.mask_NR.shape)


def _rewards(inputs: RuleInputs) -> Tensor:
    return _of_sequence(required(inputs, "reward_N", "reward"), inputs)


def _positions(inputs: RuleInputs) -> Tensor:
    return torch.arange(inputs.mask_NR.shape[1])[None, :].expand(inputs.mask_NR.shape)


def _ratio(inputs: RuleInputs) -> Tensor:
    return (inputs.stats.logp_NR - required(inputs, "old_logp_NR", "ratio")).exp()


COLUMNS: dict[str, Column] = {
    "advantage": Column("the token's advantage A", "reward, or none", lambda i: i.advantage_NR),
    "reward": Column("the response's reward", "reward", _rewards, "reward_N"),
    "logp": Column("l, the token's log-probability at θ", "nats", lambda i: i.stats.logp_NR),
    "surprisal": Column("−l", "nats", lambda i: -i.stats.logp_NR),
    "probability": Column("exp(l)", "", lambda i: i.stats.logp_NR.exp()),
    "entropy": Column(
        "h, the entropy of the next-token distribution at θ", "nats", lambda i: i.stats.entropy_NR
    ),
    "position": Column("the token's place in the response, the first is 0", "tokens", _positions),
    "length": Column(
        "the response's length, its first EOS included",
        "tokens",
        lambda i: _of_sequence(i.update.batch.response_length_N, i),
    ),
    "prompt": Column("the prompt's index in U", "", lambda i: _of_sequence(i.update.batch.prompt_N, i)),
    "sequence": Column(
        "the response's row in U, the first is 0",
        "",
        lambda i: _of_sequence(torch.arange(len(i.mask_NR)), i),
    ),
    "old_logp": Column(
        "log-probability at the policy of the ratio",
        "nats",
        lambda i: required(i, "old_logp_NR", "old_logp"),
        "old_logp_NR",
    ),
    "ratio": Column("exp(l − old_logp)", "", _ratio, "old_logp_NR"),
    "ref_logp": Column(
        "log-probability at the reference policy",
        "nats",
        lambda i: required(i, "ref_logp_NR", "ref_logp"),
        "ref_logp_NR",
    ),
    "coefficient": Column("c of the run's own J", "1/nats", lambda i: i.update.coef_NR),
    "share": Column(
        "the token's share of the predicted change, by the learning rate",
        "nats",
        lambda i: required(i, "share_NR", "share"),
        "share_NR",
    ),
    "marginal": Column(
        "the derivative of the predicted change in the token's weight, by the learning rate",
        "nats",
        lambda i: required(i, "marginal_NR", "marginal"),
        "marginal_NR",
    ),
}


def column(name: str, inputs: RuleInputs) -> Float[Tensor, "N R"]:
    """The values of a column, float64; only those of tokens in the mask mean something."""
    return COLUMNS[name].values(inputs).double()
