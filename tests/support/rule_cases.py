"""U of a policy that is a table of logits: arrays that rules read, and gradients in the logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcprobe import TokenStats, UpdateBatch
from funcprobe.policy.layout import collate, response_mask
from funcprobe.rules.rule import RuleInputs

V = 7


class Case(NamedTuple):
    inputs: RuleInputs
    logits_NRV: Tensor
    token_NR: Tensor

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """The places of the tokens in the loss."""
        return [(i, k) for i, k in self.inputs.mask_NR.nonzero().tolist()]

    def with_(self, **fields) -> "Case":
        return self._replace(inputs=self.inputs._replace(**fields))

    def stats(self, logits_NRV: Tensor) -> TokenStats:
        return statistics(logits_NRV, self.token_NR)

    def gradient(self, update: UpdateBatch) -> Tensor:
        """Of sum c l + d h in the logits."""
        d_NR = update.entropy_coef_NR
        return self.ascent(
            lambda logp, h: (update.coef_NR * logp).sum() + (0 if d_NR is None else (d_NR * h).sum())
        )

    def ascent(self, objective) -> Tensor:
        """The gradient of objective(l, h) in the logits."""
        logits_NRV = self.logits_NRV.clone().requires_grad_()
        (found,) = torch.autograd.grad(objective(*self.stats(logits_NRV)), logits_NRV)
        return found


def statistics(logits_NRV: Tensor, token_NR: Tensor) -> TokenStats:
    logp_NRV = logits_NRV.log_softmax(-1)
    logp_NR = logp_NRV.gather(-1, token_NR[..., None])[..., 0]
    return TokenStats(logp_NR, -(logp_NRV.exp() * logp_NRV).sum(-1))


def case(lengths=(5, 3, 6, 2, 4, 6), prompts=(3, 3, 8, 8, 8, 3), masked=((0, 1), (4, 3)), seed=0):
    """Responses of two prompts; advantages of both signs and 0, units per token, a bonus of its own."""
    draw = torch.Generator().manual_seed(seed)
    batch = collate([[1]] * len(lengths), [[2] * T for T in lengths], list(prompts))
    mask_NR = response_mask(batch)
    shape = mask_NR.shape

    def table(*more):
        return torch.randn(*shape, *more, generator=draw).double()

    logits_NRV, token_NR = 2 * table(V), torch.randint(V, shape, generator=draw)
    stats, old, ref = (statistics(x, token_NR) for x in (
        logits_NRV, logits_NRV + 0.4 * table(V), logits_NRV + 0.7 * table(V)
    ))  # fmt: skip
    stats = TokenStats(*(x_NR * mask_NR for x_NR in stats))
    for at in masked:
        mask_NR[at] = False
    rewards_N = torch.tensor([1.0, 0, 0.5, 0, 1, 0.25] * len(lengths))[: len(lengths)].double()
    A_N = torch.tensor([1.3, -0.7, 0.4, -1.1, 0, 2] * len(lengths))[: len(lengths)].double()
    A_NR = A_N[:, None].expand(shape) * mask_NR
    unit_NR = torch.rand(shape, generator=draw).double() * mask_NR
    count_N = mask_NR.sum(1).double()
    update = UpdateBatch(batch, A_NR * unit_NR, count_N, 0.01 * unit_NR, count_N)
    return Case(
        RuleInputs(
            update=update,
            stats=stats,
            mask_NR=mask_NR,
            advantage_NR=A_NR,
            unit_NR=unit_NR,
            reward_N=rewards_N,
            old_logp_NR=old.logp_NR * response_mask(batch),
            ref_logp_NR=ref.logp_NR * response_mask(batch),
            share_NR=table() * mask_NR,
            marginal_NR=table() * mask_NR,
        ),
        logits_NRV,
        token_NR,
    )
