"""What torch.compile would buy: each pass whole, compiled, against the same pass as it runs.

    python benchmarks/compiled.py [--shape small|0.5B] [--repeat N] [--rows N] [--length L]

funcprobe compiles nothing; this is why. A pass over plain rows of one length, values asserted equal:
the forward without a graph, torch.func's vjp and jvp, and the alpha trick, each one function to
torch.compile. The first call is timed apart, as is the first one at another length, with
dynamic=True.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from shapes import SHAPES, machine, paired, policy, print_table, random_like, ratio, require_equal
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from funcprobe import Params, tree
from funcprobe.policy.forward import trainable_params

DEFAULT_ROWS = {"small": (16, 128), "0.5B": (4, 128)}  # sequences, tokens of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int)
    args = parser.parse_args()
    count, length = DEFAULT_ROWS.get(args.shape, (4, 128))
    count, length = args.rows or count, args.length or length

    model = policy(args.shape)
    params = trainable_params(model)
    v = random_like(params)
    draw = torch.Generator().manual_seed(0)
    tokens_NL, longer_NL = (
        torch.randint(SHAPES[args.shape].vocab_size, (count, n), generator=draw)
        for n in (length, length + length // 4)
    )
    body = []
    for name, one in PASSES.items():
        call = partial(one, model, params, v)
        compiled: Callable[[Tensor], Any] = torch.compile(call, dynamic=True)
        first, value = _seconds(partial(compiled, tokens_NL))
        agreement = require_equal(name, _flat(value), _flat(call(tokens_NL)), 1e-4)
        calls = {"compiled": partial(compiled, tokens_NL), "eager": partial(call, tokens_NL)}
        times = paired(calls, args.repeat)
        again, _ = _seconds(partial(compiled, longer_NL))
        gain = ratio(times, "eager", "compiled")
        eager = f"{statistics.median(times['eager']):.3g}"
        body.append([name, str(gain), eager, f"{first:.0f}", f"{again:.1f}", f"{agreement:.0e}"])
    print(f"{args.shape} shape, {count} rows of {length} tokens, float32. {machine()}")
    print(f"Medians (quartiles) of {args.repeat} paired ratios, eager over compiled.")
    columns = ["pass", "times faster", "eager, s", "first call, s", "at another length, s", "agree to"]
    print_table(columns, body)


def _logp(model: nn.Module, params: Params, tokens_NL: Tensor) -> Tensor:
    """Log-probability of every token but the first, [N, L - 1]."""
    logits_NLV = functional_call(model, params, (tokens_NL,), {"use_cache": False}).logits[:, :-1]
    return logits_NLV.log_softmax(-1).gather(-1, tokens_NL[:, 1:, None])[..., 0]


def _forward(model: nn.Module, params: Params, _: Params, tokens_NL: Tensor) -> Tensor:
    with torch.no_grad():
        return _logp(model, params, tokens_NL)


def _gradient(model: nn.Module, params: Params, _: Params, tokens_NL: Tensor) -> Params:
    logp_NL, pull = vjp(lambda given: _logp(model, given, tokens_NL), params)  # type: ignore[misc]
    with torch.no_grad():
        (grads,) = pull(torch.ones_like(logp_NL))
    return grads  # type: ignore[no-any-return]


def _tangents(model: nn.Module, params: Params, v: Params, tokens_NL: Tensor) -> Tensor:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return jvp(lambda given: _logp(model, given, tokens_NL), (params,), (v,))[1]  # type: ignore[no-any-return]


def _alpha(model: nn.Module, params: Params, v: Params, tokens_NL: Tensor) -> Tensor:
    def h(alpha_N: Tensor) -> Tensor:
        logp_NL, pull = vjp(lambda given: _logp(model, given, tokens_NL), params)  # type: ignore[misc]
        (grads,) = pull(alpha_N[:, None].expand_as(logp_NL))
        return torch.stack([(grads[name] * v[name]).sum() for name in params]).sum()

    with sdpa_kernel(SDPBackend.MATH):
        value, pull = vjp(h, torch.ones(len(tokens_NL)))  # type: ignore[misc]
        return pull(torch.ones_like(value))[0]  # type: ignore[no-any-return]


PASSES = {"forward": _forward, "gradient": _gradient, "tangents": _tangents, "alpha_vjp": _alpha}


def _flat(value: Tensor | Params) -> Tensor:
    if isinstance(value, Tensor):
        return value.flatten()
    return torch.cat([tree.f64(value[name]).flatten() for name in sorted(value)])


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


if __name__ == "__main__":
    main()
