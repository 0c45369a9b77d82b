"""A registry is a dict by name: every public function gives the same for its names in any order."""

import inspect
import random
import typing
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import funcprobe
from funcprobe import AdamGroup, AdamState, Params, Passes, UpdateBatch
from support.builders import SHAPE
from support.policies import random_batch, random_like

E = random_batch([(0, 2, 3), (1, 3, 2), (2, 2, 4)])
U = random_batch([(0, 2, 3), (0, 2, 2), (1, 3, 2), (1, 3, 1)], seed=1)


class World:
    """A policy with its next step, all of whose registries come in an order of one's choice."""

    def __init__(self, head: bool) -> None:
        torch.manual_seed(0)
        config = Qwen2Config(**SHAPE | {"num_hidden_layers": 1})
        lora = LoraConfig(
            r=2,
            target_modules=["q_proj", "down_proj"],
            modules_to_save=["lm_head"] if head else None,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(Qwen2ForCausalLM(config), lora).double().eval()
        self.params = funcprobe.trainable_params(model)
        self.forward = funcprobe.frozen_forward(model, self.params)
        self.v, self.nu = random_like(self.params, 1), random_like(self.params, 2)
        self.nu = {n: t.square() for n, t in self.nu.items()}
        self.stats = funcprobe.token_stats(self.params, E, self.forward)
        coef_NR = torch.arange(12.0, dtype=torch.float64).view(4, 3) * funcprobe.response_mask(U)
        fields = {"batch": U, "coef_NR": coef_NR, "normaliser_N": torch.ones(4).double()}
        self.update = UpdateBatch(**{k: v for k, v in fields.items() if k in UpdateBatch._fields})
        self.passes = funcprobe.first_order_passes(*self.step(lambda x: x), self.forward)

    def adam_state(self, order: Callable[[Params], Params]) -> AdamState:
        steps = dict.fromkeys(order(self.params), 3)
        group = AdamGroup(tuple(self.params), 1e-3, 0.9, 0.99, 1e-8, 0.01)
        return AdamState(order(self.v), order(self.nu), steps, (group,))

    def earlier_state(self, order: Callable[[Params], Params]) -> AdamState:
        return self.adam_state(order)._replace(step=dict.fromkeys(order(self.params), 1))

    def step(self, order: Callable[[Params], Params]) -> tuple[Any, ...]:
        return order(self.params), E, self.update, self.adam_state(order)

    def passes_in(self, order: Callable[[Params], Params]) -> Passes:
        return self.passes._replace(Y=tuple(map(order, self.passes.Y)), X=order(self.passes.X))


Order = Callable[[Params], Params]

# Every function, given the order of the first registry and the order of the others.
CALLS: dict[str, Callable[[World, Order, Order], Any]] = {
    "token_stats": lambda w, a, b: funcprobe.token_stats(a(w.params), E, w.forward),
    "seq_logprobs": lambda w, a, b: funcprobe.seq_logprobs(a(w.params), E, w.forward),
    "weighted_grad": lambda w, a, b: funcprobe.weighted_grad(
        a(w.params), E, w.stats.logp_NR, w.stats.entropy_NR, w.forward
    ),
    "grad_X": lambda w, a, b: funcprobe.grad_X(a(w.params), E, funcprobe.Entropy(), w.forward),
    "grad_Y": lambda w, a, b: funcprobe.grad_Y(a(w.params), w.update, w.forward),
    "tangents": lambda w, a, b: funcprobe.tangents(a(w.params), E, b(w.v), w.forward),
    "token_kl": lambda w, a, b: funcprobe.token_kl(a(w.params), b(w.v), E, w.forward),
    "kl_along": lambda w, a, b: funcprobe.kl_along(a(w.params), b(w.v), E, b(w.v), w.forward, (1e-3,)),
    "second_tangents": lambda w, a, b: funcprobe.second_tangents(a(w.params), E, b(w.v), w.forward),
    "alpha_vjp": lambda w, a, b: funcprobe.alpha_vjp(a(w.params), E, b(w.v), w.forward),
    "grad_dots": lambda w, a, b: funcprobe.grad_dots(a(w.params), E, b(w.v), w.forward),
    "unlayered": lambda w, a, b: funcprobe.unlayered(a(w.params), w.forward),
    "measure": lambda w, a, b: funcprobe.measure(a(w.params), E, b(w.v), 1e-3, w.stats, w.forward),
    "predict": lambda w, a, b: funcprobe.predict(
        a(w.params), E, w.update, w.adam_state(b), w.forward, step=funcprobe.Step(max_grad_norm=0.1)
    ),
    "first_order_passes": lambda w, a, b: funcprobe.first_order_passes(
        a(w.params), E, w.update, w.adam_state(b), w.forward
    ),
    "summarise": lambda w, a, b: funcprobe.summarise(
        a(w.params), w.passes_in(b), E, w.update, w.adam_state(b)
    ),
    "marginal_tangents": lambda w, a, b: funcprobe.marginal_tangents(
        a(w.params), w.passes_in(b), w.update, w.adam_state(b), w.forward
    ),
    "attribute": lambda w, a, b: funcprobe.attribute(
        a(w.params), w.passes_in(b), w.passes.along_PX, E, w.update, w.adam_state(b)
    ),
    "influence": lambda w, a, b: funcprobe.influence(
        a(w.params), w.passes_in(b), E, w.update, w.adam_state(b), w.forward, route="columns"
    ),
    "leave_out": lambda w, a, b: funcprobe.leave_out(
        a(w.params),
        w.passes_in(b),
        w.update,
        funcprobe.subset(w.update, prompts=[1]),
        w.adam_state(b),
        w.forward,
    ),
    "module_shares": lambda w, a, b: funcprobe.module_shares(
        b(w.passes.X), a(w.params), w.passes_in(b).Y, w.adam_state(b), funcprobe.Step()
    ),
    "moment_scale": lambda w, a, b: funcprobe.moment_scale(
        a(w.params), w.passes_in(b).Y, w.adam_state(b), funcprobe.Step()
    ),
    "momentum_by_step": lambda w, a, b: funcprobe.momentum_by_step(
        b(w.passes.X), a(w.params), w.passes_in(b).Y, w.adam_state(b), [a(w.v), b(w.nu)]
    ),
    "momentum_since": lambda w, a, b: funcprobe.momentum_since(
        b(w.passes.X), a(w.params), w.passes_in(b).Y, w.adam_state(b), w.earlier_state(a)
    ),
    "recomputed_step": lambda w, a, b: funcprobe.recomputed_step(
        b(w.passes.X), a(w.nu), w.adam_state(b), b(w.v), 1, a(w.params), w.update, w.forward
    ),
    "later_factors": lambda w, a, b: funcprobe.later_factors(w.adam_state(b)),
    "lifetime": lambda w, a, b: funcprobe.lifetime(dict.fromkeys(a(w.params), 0.5), w.adam_state(b)),
    "update_direction": lambda w, a, b: funcprobe.update_direction(
        a(w.params), b(w.v), w.adam_state(b), max_grad_norm=0.1
    ),
    "response": lambda w, a, b: funcprobe.response(
        a(w.params), b(w.passes.X), b(w.v), w.adam_state(b), max_grad_norm=0.1
    ),
    "preconditioner": lambda w, a, b: funcprobe.preconditioner(a(w.params), w.adam_state(b)),
    "precondition": lambda w, a, b: funcprobe.precondition(a(w.v), w.adam_state(b)),
    "state_evidence": lambda w, a, b: funcprobe.state_evidence(a(w.passes.Y[0]), w.adam_state(b)),
    "gradient_scale": lambda w, a, b: funcprobe.gradient_scale(a(w.passes.Y[0]), w.adam_state(b)),
    "fresh_adam_state": lambda w, a, b: funcprobe.fresh_adam_state(a(w.params), ()).exp_avg,
    "lora_params": lambda w, a, b: funcprobe.lora_params(a(w.params)),
}
# These take the registry with its model, and the others call what they return.
BINDING = {"frozen_forward", "masked_forwards", "base_params", "adapter_params"}


def backwards(params: Params) -> Params:
    return dict(reversed(list(params.items())))


def shuffled(params: Params) -> Params:
    items = list(params.items())
    random.Random(3).shuffle(items)
    return dict(items)


def same(params: Params) -> Params:
    return params


@pytest.fixture(scope="module", params=[False, True], ids=["backbone", "trained head"])
def world(request) -> World:
    return World(request.param)


@pytest.mark.parametrize("name", CALLS)
def test_names_in_any_order(world, name):
    with torch.no_grad():
        expected, spec = optree.tree_flatten(CALLS[name](world, same, same))
        for orders in ((backwards, same), (same, backwards), (shuffled, backwards)):
            found, found_spec = optree.tree_flatten(CALLS[name](world, *orders))  # sorted by name
            assert found_spec == spec
            for a, b in zip(found, expected, strict=True):
                if isinstance(b, torch.Tensor | float):
                    # Rounding alone: some sums over names follow the order of the dict.
                    torch.testing.assert_close(
                        torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-12, equal_nan=True
                    )
                elif not isinstance(b, str):
                    assert a == b


def test_the_forward_is_bound_in_any_order(world):
    for order in (backwards, shuffled):
        again = funcprobe.token_stats(order(world.params), E, world.forward)
        assert torch.equal(again.logp_NR, world.stats.logp_NR)


def test_every_public_function_of_registries_is_here():
    def takes(function: Any) -> bool:
        hints = typing.get_type_hints(function)
        return any(
            hints.get(p) in {Params, AdamState, Passes} for p in inspect.signature(function).parameters
        )

    public = {n for n in funcprobe.__all__ if inspect.isfunction(getattr(funcprobe, n))}
    assert {n for n in public if takes(getattr(funcprobe, n))} == CALLS.keys() | BINDING
