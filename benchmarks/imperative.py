"""The first-order computation as imperative probe scripts do it, the baseline of against.py.

Prompt by prompt: a forward for statistics, a backward for X or Y, and once v is known a second
backward for the dot of every prompt's gradient, which nobody could keep. Logits are of all tokens,
gradients come from `.grad` and are copied to the CPU each time. The formulas are funcprobe's, so that
values agree.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from funcprobe import AdamState, Batch, Params, Passes, TokenStats, UpdateBatch, tree, update_direction
from funcprobe.statistics import evaluation


class FirstOrder(NamedTuple):
    """X and Y, <X, v>, the share s_n of every sequence of E and t_m of every prompt of U."""

    X: Params
    Y: Params
    bars_dot: float
    s_N: Tensor
    t_M: Tensor


def of_passes(
    passes: Passes, params: Params, batch: Batch, update: UpdateBatch, state: AdamState
) -> FirstOrder:
    """The same from `funcprobe.first_order_passes`, by arithmetic alone."""
    v = update_direction(params, passes.Y[0], state).total
    p_NR, q_NR = evaluation.gradient_coefficients(evaluation.evaluate(batch, passes.stats))
    s_N = (p_NR * passes.tangent.logp_NR + q_NR * passes.tangent.entropy_NR).sum(1)
    t_N = (update.coef_NR * passes.along_PX.logp_NR).sum(1)
    prompt_N = update.batch.prompt_N
    t_M = torch.zeros(int(prompt_N.max()) + 1, dtype=torch.float64).index_add(0, prompt_N, t_N)
    return FirstOrder(passes.X, passes.Y[0], tree.dot(passes.X, v), s_N, t_M)


def first_order(model: PeftModel, batch: Batch, update: UpdateBatch, state: AdamState) -> FirstOrder:
    """X, Y, <X, v>, s_n and t_m with two backward passes of every prompt of E and U."""
    params = {n: p.detach() for n, p in sorted(model.named_parameters()) if p.requires_grad}
    p_NR, q_NR = evaluation.gradient_coefficients(evaluation.evaluate(batch, _stats(model, batch)))
    zero_NR = torch.zeros_like(update.coef_NR)

    X = tree.zeros(params)
    for grads in _prompt_gradients(model, batch, p_NR, q_NR):
        X = tree.add(X, grads)
    Y = tree.zeros(params)
    for grads in _prompt_gradients(model, update.batch, update.coef_NR, zero_NR):
        Y = tree.add(Y, grads)
    direction = update_direction(params, Y, state)
    v = direction.total
    s_N = [tree.dot(grads, v) for grads in _prompt_gradients(model, batch, p_NR, q_NR)]
    PX = tree.multiply(direction.scale, X)
    again = _prompt_gradients(model, update.batch, update.coef_NR, zero_NR)
    t_M = [tree.dot(grads, PX) for grads in again]
    return FirstOrder(X, Y, tree.dot(X, v), torch.tensor(s_N), torch.tensor(t_M))


def _stats(model: PeftModel, batch: Batch) -> TokenStats:
    shape = (len(batch.tokens_NL), int(batch.response_length_N.max()))
    logp_NR, entropy_NR = (torch.zeros(shape, dtype=torch.float64) for _ in "lh")
    with torch.no_grad():
        for i in range(shape[0]):
            logp_nR, entropy_nR = _log_probabilities(model, batch, [i])
            logp_NR[i, : logp_nR.shape[1]] = logp_nR[0].double().cpu()
            entropy_NR[i, : entropy_nR.shape[1]] = entropy_nR[0].double().cpu()
    return TokenStats(logp_NR, entropy_NR)


def _prompt_gradients(model: PeftModel, batch: Batch, p_NR: Tensor, q_NR: Tensor) -> Iterator[Params]:
    """The gradient of sum p l + q h over every prompt's responses, on the CPU, prompt by prompt."""
    named = {n: p for n, p in sorted(model.named_parameters()) if p.requires_grad}
    for prompt in batch.prompt_N.unique():
        index = (batch.prompt_N == prompt).nonzero().squeeze(1).tolist()
        logp_nR, entropy_nR = _log_probabilities(model, batch, index)
        R = logp_nR.shape[1]
        p_nR, q_nR = (c[index, :R].to(logp_nR) for c in (p_NR, q_NR))
        model.zero_grad()
        (p_nR * logp_nR + q_nR * entropy_nR).sum().backward()
        yield {n: p.grad.detach().cpu().clone() for n, p in named.items()}
    model.zero_grad()


def _log_probabilities(model: PeftModel, batch: Batch, index: list[int]) -> tuple[Tensor, Tensor]:
    """l and h of the responses of sequences that have one length, from logits of all their tokens."""
    P, R = int(batch.prompt_length_N[index[0]]), int(batch.response_length_N[index[0]])
    tokens_nL = batch.tokens_NL[index, : P + R].to(model.device)
    logp_nLV = model(tokens_nL).logits.log_softmax(-1)
    entropy_nL = -(logp_nLV.exp() * logp_nLV).sum(-1)
    logp_nR = logp_nLV[:, P - 1 : -1].gather(-1, tokens_nL[:, P:, None]).squeeze(-1)
    return logp_nR, entropy_nL[:, P - 1 : -1]
