"""Against what people would use, on identical rows and directions, values asserted equal.

    python benchmarks/against.py [--shape small|0.5B|1.5B] [--repeat 5] [--device cpu]
    python benchmarks/against.py --rows 2 4096 --routes bergson   # the first table, of long rows
    pip install --no-deps bergson==2.5.1; pip install natsort ml_dtypes petname simple-parsing torchopt

The third line installs bergson, which is no dependency of funcprobe; without it the rest runs.
First table: s_n = <grad S_n, mu>, S_n the log-probability of response n, for all sequences of a
microbatch. Second: the whole first-order computation against the imperative way of imperative.py.
"""

import argparse
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import imperative
import torch
from peft import PeftModel
from shapes import (
    SHAPES,
    adam_state,
    flat,
    machine,
    paired,
    peak_extra,
    policy,
    print_table,
    random_like,
    ratio,
    require_equal,
    rows,
    tokens,
    update_rows,
    verdict,
)
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcprobe
from funcprobe import Batch, Params

OURS = "funcprobe, grad_dots"
WHOLE_OURS = "funcprobe, first_order_passes"
INSTALL = (
    "pip install --no-deps bergson==2.5.1; "
    "pip install natsort ml_dtypes petname simple-parsing torchopt"
)
# Times ours: the naive loop's bound holds at the 0.5B shape alone.
BOUNDS = {"naive loop": 1.3, "bergson": 1.0}
IMPERATIVE_BOUND = 3.0
EQUAL = 1e-5  # relative, of the vector of all s_n: float32 sums in another order stay below
EQUAL_WHOLE = 1e-4  # p is what differs among entropies, which are ten times as large, in float32
# Sequences and tokens of each in the first table; B_E, B_U, G, P, R in the second.
CONTRACTION = {"small": (16, 128), "0.5B": (4, 128), "1.5B": (8, 256)}
WHOLE = {"small": (64, 2, 8, 64, 64), "0.5B": (8, 1, 2, 100, 50), "1.5B": (64, 2, 8, 200, 100)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--whole-repeat", type=int, default=3, help="of the second table")
    parser.add_argument("--whole", type=int, nargs=5, metavar=("B_E", "B_U", "G", "P", "R"))
    parser.add_argument(
        "--rows", type=int, nargs=2, metavar=("N", "L"), help="first table alone: N rows of L tokens"
    )
    parser.add_argument(
        "--routes", nargs="+", default=[""], help="beginnings of the names of routes beside the loop"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = policy(args.shape, args.device)
    print(f"{args.shape} shape, float32. {machine(args.device)}")
    count, length = args.rows or CONTRACTION.get(args.shape, (8, 128))
    _contraction(model, args.shape, count, length, args.repeat, args.device, tuple(args.routes))
    if args.rows:
        return
    sizes = args.whole or WHOLE.get(args.shape, (16, 2, 4, 64, 64))
    _first_order(model, args.shape, sizes, args.whole_repeat, args.device)


def _contraction(
    model: PeftModel,
    shape: str,
    count: int,
    length: int,
    repeat: int,
    device: str,
    routes: tuple[str, ...],
) -> None:
    batch = rows(shape, prompts=count, G=1, P=length - length // 2, R=length // 2)
    probe = funcprobe.bind(model, max_tokens=count * length)
    params, mu = probe.params, random_like(probe.params)
    calls: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: probe.grad_dots(params, batch, mu)[0],
        "funcprobe, tangents": lambda: probe.tangents(params, batch, mu)[1].logp_NR.sum(1),
        "funcprobe, alpha_vjp": lambda: probe.alpha_vjp(params, batch, mu),
        "naive loop": partial(naive_loop, model, batch, mu),
        "vmap(grad)": partial(vmap_grad, model, params, batch, mu),
    }
    if importlib.util.find_spec("bergson"):
        calls |= bergson_routes(model, params, batch, mu)
    else:
        print(f"bergson is not installed, and left out: {INSTALL}")
    calls = {n: c for n, c in calls.items() if n in (OURS, "naive loop") or n.startswith(routes)}
    memory, values = {}, {}
    for name, call in calls.items():
        values[name], memory[name] = peak_extra(call, device)
    errors = {
        name: require_equal(name, value, values["naive loop"], EQUAL) for name, value in values.items()
    }
    times = paired(calls, repeat, device, warm=False)  # the calls above were the warm-up

    print(f"s_n of {count} rows of {length} tokens, half response; {repeat} paired ratios.")
    body = []
    for name in calls:
        cost = ratio(times, name, OURS)
        bound = BOUNDS.get(name.split(",")[0])
        bound = None if name == "naive loop" and shape == "small" else bound
        seconds = f"{statistics.median(times[name]):.3g}"
        checked = verdict(cost.median, bound, at_least=True)
        body.append([name, str(cost), *checked, f"{memory[name]:.0f}", seconds, f"{errors[name]:.1g}"])
    print_table(
        ["route", "times ours", "bound", "", "extra memory, MiB", "seconds", "off the naive loop"], body
    )


def naive_loop(model: PeftModel, batch: Batch, mu: Params) -> Tensor:
    """A backward pass for each sequence, logits of all its tokens, plain autograd: s_n [N]."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    s_n = []
    for i, P in enumerate(batch.prompt_length_N.tolist()):
        end = P + int(batch.response_length_N[i])
        tokens_1L = batch.tokens_NL[i : i + 1, :end].to(model.device)
        logp_LV = model(tokens_1L).logits[0].log_softmax(-1)
        S = logp_LV[P - 1 : end - 1].gather(-1, tokens_1L[0, P:, None]).sum()
        grads = torch.autograd.grad(S, list(trainable.values()))
        s_n.append(sum((g * mu[n]).sum() for n, g in zip(trainable, grads, strict=True)))
    return torch.stack(s_n)


def vmap_grad(model: PeftModel, params: Params, batch: Batch, mu: Params) -> Tensor:
    """Per-sequence gradients of all sequences at once, then their dots; all rows of one length."""
    P, R = int(batch.prompt_length_N[0]), int(batch.response_length_N[0])

    def sequence_logp(given: Params, tokens_L: Tensor) -> Tensor:
        logp_LV = functional_call(model, given, (tokens_L[None],)).logits[0].log_softmax(-1)
        return logp_LV[P - 1 : P + R - 1].gather(-1, tokens_L[P:, None]).sum()

    with sdpa_kernel(SDPBackend.MATH):
        tokens_NL = batch.tokens_NL.to(model.device)
        grads = vmap(grad(sequence_logp), in_dims=(None, 0))(params, tokens_NL)
    return torch.stack([(grads[n] * mu[n]).flatten(1).sum(1) for n in params]).sum(0)


def bergson_routes(
    model: PeftModel, params: Params, batch: Batch, mu: Params
) -> dict[str, Callable[[], Tensor]]:
    """bergson 2.5.1's loop over batches, without its files and progress bars, on one batch.

    Hooks divide a gradient by sqrt(nu) + 1e-8 before its dot with the query, so the query that gives
    <grad S_n, mu> is mu (sqrt(nu) + 1e-8). Its loss is -S_n. What is made once a run is made here.
    """
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector, Scorer
    from bergson.collector.collector import fwd_bwd_factory
    from bergson.collector.gradient_collectors import GradientCollector
    from bergson.data import pad_and_tensor
    from bergson.gradients import AdamNormalizer
    from bergson.score.output_influence import output_token_influence, query_directions
    from bergson.score.score_writer import InMemorySequenceScoreWriter, InMemoryTokenScoreWriter
    from datasets import Dataset

    module_of = {n: n.removeprefix("base_model.").removesuffix(".weight") for n in params}
    modules = list(module_of.values())
    count = len(batch.tokens_NL)
    ids = batch.tokens_NL.tolist()
    prompt = batch.prompt_length_N.tolist()
    labels = [[-100] * P + row[P:] for P, row in zip(prompt, ids, strict=True)]
    x, y, _, mask = pad_and_tensor(ids, labels=labels, device=model.device)
    draw = torch.Generator().manual_seed(4)
    nu = {n: 1e-4 * torch.rand(t.shape, generator=draw).to(t).square() for n, t in params.items()}

    def hooks(by_token: bool) -> Callable[[], Tensor]:
        config = IndexConfig(tempfile.gettempdir(), loss_reduction="sum", attribute_tokens=by_token)
        data = Dataset.from_dict({"input_ids": ids, "labels": labels})
        writer: Any = (
            InMemoryTokenScoreWriter(data, 1) if by_token else InMemorySequenceScoreWriter(count, 1)
        )
        query = {module_of[n]: (mu[n] * (nu[n].sqrt() + 1e-8)).flatten()[None] for n in params}
        collector = InMemoryCollector(
            model=model.base_model,
            data=data,
            cfg=config,
            target_modules=set(modules),
            processor=GradientProcessor({module_of[n]: AdamNormalizer(nu[n]) for n in params}),
            scorer=Scorer(
                query, modules, writer, model.device, torch.float32, attribute_tokens=by_token
            ),
        )
        forward_backward = fwd_bwd_factory(config)

        def score() -> Tensor:
            with collector.with_batch(mask):
                losses = forward_backward(model, x, y, {})
            collector.process_batch(list(range(count)), losses=losses)
            scores = collector.scorer.writer.scores
            return -torch.stack([s.sum() for s in scores])

        return score

    targets = GradientCollector.discover_targets(model.base_model, set(modules))
    columns = {module_of[n]: mu[n].flatten()[:, None] for n in params}
    directions = query_directions(model, columns, targets)
    config = IndexConfig(tempfile.gettempdir(), loss_reduction="sum")

    def forward_mode() -> Tensor:
        base = model.get_base_model()
        base.set_attn_implementation("eager")  # as its worker loads the model
        try:
            rates, _ = output_token_influence(model, x, y, directions, config)
        finally:
            base.set_attn_implementation("sdpa")
        return -rates.sum((1, 2))

    return {
        "bergson, hooks with optimizer state": hooks(by_token=False),
        "bergson, the same by token": hooks(by_token=True),
        "bergson, jvp": forward_mode,
    }


def _first_order(
    model: PeftModel, shape: str, sizes: tuple[int, ...], repeat: int, device: str
) -> None:
    B_E, B_U, G, P, R = sizes
    batch, update = rows(shape, B_E, 1, P, R), update_rows(shape, B_U, G, P, R)
    probe = funcprobe.bind(model)
    state = adam_state(probe.params)

    def ours() -> imperative.FirstOrder:
        return imperative.of_passes(
            funcprobe.first_order_passes(probe.params, batch, update, state, probe.forward),
            probe.params,
            batch,
            update,
            state,
        )

    calls = {
        WHOLE_OURS: ours,
        "imperative": partial(imperative.first_order, model, batch, update, state),
    }
    memory, values = {}, {}
    for name, call in calls.items():
        values[name], memory[name] = peak_extra(call, device)
    mine, theirs = values.values()
    pairs = {
        "X": (flat(mine.X), flat(theirs.X)),
        "Y": (flat(mine.Y), flat(theirs.Y)),
        "bars_dot": (torch.tensor(mine.bars_dot), torch.tensor(theirs.bars_dot)),
        "s_n": (mine.s_N, theirs.s_N),
        "t_m": (mine.t_M, theirs.t_M),
    }
    found = ", ".join(
        f"{what} {require_equal(what, *pair, EQUAL_WHOLE):.1g}" for what, pair in pairs.items()
    )
    times = paired(calls, repeat, device, warm=False)
    speed_up = ratio(times, "imperative", WHOLE_OURS)
    count = f"{tokens(batch)} tokens of E, {tokens(update.batch)} of U ({P} + {R} a row, G = {G})"
    print(f"X, Y, <X, v>, s_n, t_m: {count}; {repeat} paired ratios; differences: {found}.")
    body = [
        [
            name,
            str(ratio(times, name, WHOLE_OURS)),
            *(
                verdict(speed_up.median, IMPERATIVE_BOUND, at_least=True)
                if name == "imperative"
                else ["", ""]
            ),
            f"{memory[name]:.0f}",
            f"{statistics.median(times[name]):.3g}",
        ]
        for name in calls
    ]
    print_table(["way", "times ours", "bound", "", "extra memory, MiB", "seconds"], body)


if __name__ == "__main__":
    main()
