"""Time and memory of the head: hidden states of response tokens -> (log-probability, entropy).

    python benchmarks/head_cost.py [--tokens 1024] [--shape 0.5B] [--repeat 7] [--device cpu]

The unit is one product of the hidden states with the output embedding, measured in the same
repetition; the columns are the head alone, with the hidden states and their tangents given:
forward (no derivative wanted), gradient of sum p l + q h in the hidden states, tangents of l and h
along a tangent of the hidden states, double vjp (<d f_i / d hidden, mu> of every token by the vjp of
a vjp). Extra memory is the peak over what was held before, MiB.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from shapes import (
    SHAPES,
    Ratio,
    machine,
    paired,
    peak_extra,
    policy,
    print_table,
    ratio,
    require_equal,
    verdict,
)
from torch import Tensor, nn
from torch.func import jvp, vjp
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

import funcprobe
from funcprobe import Params, tree
from funcprobe.passes.head import head_gradient, head_tangents, token_head
from funcprobe.policy.forward import Forward

UNIT, OURS, ENTROPY = "product", "funcprobe", "log_softmax, gather, entropy"
MODES = ("forward", "gradient", "tangents", "double vjp")
BOUNDS = {"forward": 1.6, "gradient": 2.6, "tangents": 2.7, "double vjp": 2.8}  # products
MEMORY_BOUND = 250.0  # MiB, in every mode

Head: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]  # hidden_TD -> l, h (zeros: no entropy)


class Given(NamedTuple):
    """What every head gets: the embedding, and tokens with coefficients and a tangent."""

    embedding_VD: Tensor
    hidden_TD: Tensor
    target_T: Tensor
    p_T: Tensor
    q_T: Tensor
    tangent_TD: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5B", help="width, vocabulary")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    shape = SHAPES[args.shape]._replace(num_hidden_layers=1, intermediate_size=64)
    model = policy(shape, args.device)
    probe = funcprobe.bind(model)
    given = _given(model.get_output_embeddings().weight.detach(), args.tokens)
    heads = {
        "log_softmax, gather": (partial(log_softmax, given, entropy=False), MODES),
        ENTROPY: (partial(log_softmax, given, entropy=True), MODES),
        "F.cross_entropy, no entropy": (partial(cross_entropy, given), MODES),
        # TRL is made for reverse mode; nobody takes tangents or second derivatives of it.
        "TRL selective_log_softmax + entropy_from_logits": (partial(trl, given), MODES[:2]),
    }
    calls: dict[str, Callable[[], object]] = {
        UNIT: torch.no_grad()(lambda: given.hidden_TD @ given.embedding_VD.T)
    }
    for name, (head, modes) in heads.items():
        calls |= {f"{name}: {mode}": partial(_PLAIN[mode], head, given) for mode in modes}
    for mode in MODES:
        calls[f"{OURS}: {mode}"] = partial(_OURS[mode], probe.params, probe.forward, given)
    values, memory = {}, {}
    for name, call in calls.items():
        value, memory[name] = peak_extra(call, args.device)
        if ENTROPY in name or OURS in name:
            values[name] = value
    _require_agreement(values)
    del values
    times = paired(calls, args.repeat, args.device, warm=False)  # the calls above were the warm-up

    V, D = given.embedding_VD.shape
    print(f"{args.tokens} tokens, V = {V:,}, hidden {D}, float32. {machine(args.device)}")
    unit = sorted(times[UNIT])[len(times[UNIT]) // 2]
    logits = given.hidden_TD.shape[0] * V * 4 / 2**20
    print(f"Unit: {unit:.3g} s; logits are {logits:.0f} MiB. {args.repeat} paired ratios.")
    body = []
    for name in [*heads, OURS]:
        cells = [name]
        for mode in MODES:
            key = f"{name}: {mode}"
            cells += [_cell(ratio(times, key, UNIT), memory[key])] if key in calls else ["–"]
        body.append(cells)
    print_table(["products (quartiles); extra memory, MiB", *MODES], body)
    body = []
    for mode in MODES:
        key = f"{OURS}: {mode}"
        cost = ratio(times, key, UNIT)
        checked = [*verdict(cost.median, BOUNDS[mode]), *verdict(memory[key], MEMORY_BOUND)]
        body.append([mode, str(cost), *checked[:2], f"{memory[key]:.0f}", *checked[2:]])
    print_table([OURS, "products", "bound", "", "MiB", "bound", ""], body)


# Ours, in the four places where funcprobe calls its head.


def ours_forward(params: Params, forward: Forward, given: Given) -> tuple[Tensor, Tensor]:
    """l and h where no derivative is wanted, as token_stats."""
    with torch.no_grad():
        return token_head(params, given.hidden_TD, given.target_T, forward)


def ours_gradient(params: Params, forward: Forward, given: Given) -> Tensor:
    """d (sum p l + q h) / d hidden, as weighted_grad."""
    rows = (given.hidden_TD, given.target_T, given.p_T, given.q_T)
    return head_gradient(params, *rows, forward)[0]


def ours_tangents(params: Params, forward: Forward, given: Given) -> tuple[Tensor, Tensor]:
    """l' and h', as tangents; the direction is of parameters that the head has not."""
    rows = (given.hidden_TD, given.tangent_TD, given.target_T)
    _, _, dlogp_T, dentropy_T = head_tangents(params, *rows, tree.zeros(params), forward)
    return dlogp_T, dentropy_T


def ours_double_vjp(params: Params, forward: Forward, given: Given) -> Tensor:
    """<d f_t / d hidden, mu> of every token t, as alpha_vjp: rows, then their vjp in alpha."""
    row_TD = ours_gradient(params, forward, given)
    ones_T = torch.ones_like(given.p_T)
    dot, pull = vjp(lambda alpha_T: (alpha_T[:, None] * row_TD * given.tangent_TD).sum(), ones_T)
    with torch.no_grad():
        (s_T,) = pull(torch.ones_like(dot))
    return s_T


# Others.


def log_softmax(given: Given, hidden_TD: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor]:
    logp_TV = (hidden_TD @ given.embedding_VD.T).log_softmax(-1)
    logp_T = logp_TV.gather(-1, given.target_T[:, None]).squeeze(-1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1) if entropy else torch.zeros_like(logp_T)
    return logp_T, entropy_T


def cross_entropy(given: Given, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    logits_TV = hidden_TD @ given.embedding_VD.T
    logp_T = -nn.functional.cross_entropy(logits_TV, given.target_T, reduction="none")
    return logp_T, torch.zeros_like(logp_T)


def trl(given: Given, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    logits_1TV = (hidden_TD @ given.embedding_VD.T)[None]
    logp_1T = selective_log_softmax(logits_1TV, given.target_T[None])
    return logp_1T[0], entropy_from_logits(logits_1TV)[0]


def plain_forward(head: Head, given: Given) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return head(given.hidden_TD)


def plain_gradient(head: Head, given: Given) -> Tensor:
    hidden_TD = given.hidden_TD.clone().requires_grad_()
    logp_T, entropy_T = head(hidden_TD)
    (grad_TD,) = torch.autograd.grad((given.p_T * logp_T + given.q_T * entropy_T).sum(), hidden_TD)
    return grad_TD


def plain_tangents(head: Head, given: Given) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        _, tangent = jvp(head, (given.hidden_TD,), (given.tangent_TD,))
    logp_T, entropy_T = tangent
    return logp_T, entropy_T


def plain_double_vjp(head: Head, given: Given) -> Tensor:
    def f(hidden_TD: Tensor) -> Tensor:
        logp_T, entropy_T = head(hidden_TD)
        return given.p_T * logp_T + given.q_T * entropy_T

    def gradient_dot(alpha_T: Tensor) -> Tensor:
        _, pull = vjp(f, given.hidden_TD)
        return (pull(alpha_T)[0] * given.tangent_TD).sum()

    dot, pull_alpha = vjp(gradient_dot, torch.ones_like(given.p_T))
    with torch.no_grad():
        (s_T,) = pull_alpha(torch.ones_like(dot))
    return s_T


_PLAIN = dict(
    zip(MODES, (plain_forward, plain_gradient, plain_tangents, plain_double_vjp), strict=True)
)
_OURS = dict(zip(MODES, (ours_forward, ours_gradient, ours_tangents, ours_double_vjp), strict=True))


def _given(embedding_VD: Tensor, count: int) -> Given:
    V, D = embedding_VD.shape
    draw = torch.Generator().manual_seed(0)
    hidden_TD, tangent_TD = (torch.randn(count, D, generator=draw) for _ in "ht")
    p_T, q_T = (torch.randn(count, generator=draw) for _ in "pq")
    target_T = torch.randint(V, (count,), generator=draw)
    drawn = (hidden_TD, target_T, p_T, q_T, tangent_TD)
    return Given(embedding_VD, *(t.to(embedding_VD.device) for t in drawn))


def _require_agreement(values: dict[str, object]) -> None:
    """Ours against log_softmax, gather, entropy in every mode; 1e-5: float32."""
    for mode in MODES:
        mine, theirs = (values[f"{name}: {mode}"] for name in (OURS, ENTROPY))
        if isinstance(mine, Tensor):
            mine, theirs = (mine,), (theirs,)
        for a, b in zip(mine, theirs, strict=True):
            require_equal(f"head, {mode}", a, b, 1e-5)


def _cell(cost: Ratio, memory: float) -> str:
    return f"{cost}; {memory:,.0f}"


if __name__ == "__main__":
    main()
