"""The core on a device that is not the CPU, on machines that have no other.

A device of Python's own (torch's PrivateUse1): its tensors say that they are elsewhere, hold their
numbers on the CPU and refuse to meet a tensor that is there, as a GPU's do. So whatever is made on the
CPU and forgotten there is found, numbers can be compared, and what a GPU would be waited for is
counted. Registered once for good, it needs a process of its own: each test is one.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import Qwen2Config, Qwen2ForCausalLM

import funcprobe
from funcprobe import AdamGroup, AdamState, Step, UpdateBatch, checks, tree
from funcprobe.autodiff.replaced import Replaced
from funcprobe.policy import forward as forward_module

NAME = "elsewhere"
MAX_TOKENS = 16  # so that a batch takes several microbatches
aten = torch.ops.aten


class MixedError(RuntimeError):
    """A tensor of the CPU, not a single number, among those of the device."""


class Elsewhere(Tensor):
    """A tensor on the device; its numbers are in `held`, on the CPU."""

    held: Tensor
    kinds: dict[type, type] = {}  # noqa: RUF012  (a cache)

    @staticmethod
    def __new__(cls: type, held: Tensor) -> "Elsewhere":
        out = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        out.held = held
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} while the device is off")

    def as_subclass(self, cls: type) -> Tensor:
        """Taylor mode's tensors are a class of their own: here they are that and this."""
        kind = self.kinds.setdefault(cls, type(cls.__name__, (cls, Elsewhere), {}))
        return Elsewhere.__new__(kind, self.held)

    def tolist(self) -> Any:
        return self.held.tolist()


class Device(TorchDispatchMode):
    """While on, operations on the device's tensors are done on what they hold; waits are counted."""

    WAITS = (aten._local_scalar_dense.default, aten.nonzero.default)

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        ours = {id(x.held): x for x in tensors if isinstance(x, Elsewhere)}
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        if not ours and target != NAME:
            return func(*args, **kwargs)
        joins = func in (aten.cat.default, aten.stack.default)  # of numbers, too
        foreign = [x for x in tensors if not isinstance(x, Elsewhere) and x.is_cpu and x.dim() + joins]
        if ours and foreign and func is not aten.copy_.default:
            raise MixedError(f"{func}: a tensor of the CPU, of shape {tuple(foreign[0].shape)}")
        if ours and (target == "cpu" or func in self.WAITS):
            self.waits[str(func)] += 1
        if target == NAME:
            kwargs["device"] = torch.device("cpu")
        if func is aten._efficientzerotensor.default:  # a tangent that takes no memory
            func = aten.zeros.default
        args, kwargs = tree_map_only(Elsewhere, lambda x: x.held, (args, kwargs))
        out = func(*args, **kwargs)
        if target in {"cpu", "meta"}:
            return out
        return tree_map_only(Tensor, lambda x: ours[id(x)] if id(x) in ours else Elsewhere(x), out)


class Backend(backend_registration._DummyBackendModule):
    """What torch asks a device's module for."""

    def device_count(self) -> int:
        return 1

    def get_rng_state(self, _: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, _: Any = 0) -> None:
        torch.set_rng_state(state)

    def manual_seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)


def make_policy(dtype: torch.dtype = torch.float64, layers: int = 1) -> Any:
    """Two heads to a key, LoRA on all linears, all of it random."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(Qwen2ForCausalLM(config), lora).to(dtype).eval()


def taken_elsewhere(model: Any, place_of: Callable[[str], str] = lambda _: NAME) -> Any:
    """In place, as to() does it for a device whose tensors are torch's own."""
    for path, module in model.named_modules():
        device = place_of(path)
        for name, p in module._parameters.items():
            if p is not None:
                moved = torch.nn.Parameter(p.data.to(device), requires_grad=p.requires_grad)
                module._parameters[name] = moved
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else b.to(device)
    return model


def split(model: Any, order: tuple[str, str]) -> Any:
    """A layer here, one there, the head where the embedding is, with accelerate's hooks between."""
    first, last = order
    places = {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first}
    places |= {"model.layers.1": last, "model.norm": last, "lm_head": first}

    def place_of(path: str) -> str:
        inner = path.removeprefix("base_model.model.")
        return next((p for name, p in places.items() if inner.startswith(name)), first)

    taken_elsewhere(model, place_of)
    execution = {"": torch.device(first)} | {name: torch.device(p) for name, p in places.items()}
    offload = dict.fromkeys(places, False)
    attach_align_device_hook_on_blocks(model.get_base_model(), execution, offload=offload)
    assert {p.device.type for p in model.parameters()} == set(order)
    return model


def make_batch(copies: int = 1) -> funcprobe.Batch:
    """Two responses to one prompt, a long and a short one of others, each `copies` times."""
    prompts = [[1, 2, 3], [1, 2, 3], [4, 5], [6, 7, 8, 9]] * copies
    responses = [[3, 1, 4, 1], [5, 9], [2, 6, 5, 3, 5], [8]] * copies
    return funcprobe.collate(prompts, responses, [0, 0, 1, 2] * copies)


EVEN = funcprobe.collate([[1, 2], [3, 4]], [[5, 6, 7], [8, 9, 10]], [0, 1])  # a sequence a row


def random_like(params: funcprobe.Params, seed: int) -> funcprobe.Params:
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=draw).double() for n, t in params.items()}


def coefficients(batch: funcprobe.Batch) -> Tensor:
    mask_NR = funcprobe.response_mask(batch)
    return torch.randn(mask_NR.shape, generator=torch.Generator().manual_seed(2)).double() * mask_NR


def passes(probe: funcprobe.Probe, batch: funcprobe.Batch) -> dict[str, Any]:
    """What the model is needed for, as trees of tensors."""
    params, coef_NR, v = probe.params, coefficients(batch), random_like(probe.params, 1)
    return {
        "token_stats": tuple(probe.token_stats(params, batch)),
        "weighted_grad": probe.weighted_grad(params, batch, coef_NR, coef_NR),
        "tangents": probe.tangents(params, batch, v),
        "alpha_vjp": probe.alpha_vjp(params, batch, v),
        "grad_dots": probe.grad_dots(params, batch, v, p_NR=coef_NR),
        "second_tangents": probe.second_tangents(params, batch, v),
    }


def composed(probe: funcprobe.Probe, model: Any, batch: funcprobe.Batch) -> dict[str, Any]:
    """The step, the prediction, the measurement; the checks pass."""
    params = probe.params
    group = AdamGroup(tuple(params), 1e-3, 0.9, 0.999, 1e-8, 0.1)
    # As a live optimizer has them, beside the parameters.
    mean, nu = ({n: t.to(params[n]) for n, t in random_like(params, i).items()} for i in (4, 5))
    state = AdamState(mean, tree.multiply(nu, nu), dict.fromkeys(params, 9), (group,))
    update = UpdateBatch(batch, coefficients(batch), batch.response_length_N.double())
    seen = probe.predict(params, batch, update, state, step=Step(max_grad_norm=0.5))
    v = seen.direction.total
    measured = probe.measure(params, batch, v, 1e-6, seen.stats)
    given = (probe.forward, MAX_TOKENS)
    checked = [
        checks.adapter_changes_logits(params, batch, seen.stats, *given),
        checks.gradients_reach("X", seen.X),
        checks.alpha_cases(params, batch, v, *given, most=2),
        checks.float64_throughout(model, batch),
        checks.repeat_is_identical(params, batch, seen.stats, *given),
    ]
    assert [one for one in checked if not one.passed] == [], checked
    beside = {n: t.to(params[n]) for n, t in seen.Y.items()}  # as a trainer has its gradients
    rule = partial(funcprobe.update_direction, params, beside, state)
    return {
        "prediction": torch.tensor([seen.derivative, seen.bars_dot, seen.se_total]),
        "measured": torch.tensor([measured.delta, measured.ess]),
        "direction": v,
        "precondition": rule(rule="precondition").total,
        "sgd": rule(rule="sgd").total,
    }


def all_of_the_core() -> None:
    """The numbers of the CPU, and no tensor of it among the device's."""
    here = make_policy()
    probe = funcprobe.bind(here, max_tokens=MAX_TOKENS)
    expected = [passes(probe, make_batch()), passes(probe, EVEN), composed(probe, here, make_batch())]
    with Device():
        there = taken_elsewhere(make_policy())
        assert {p.device.type for p in there.parameters()} == {NAME}
        probe = funcprobe.bind(there, max_tokens=MAX_TOKENS)
        assert probe.forward.layout == "shared", probe.forward.notes
        found = [passes(probe, make_batch()), passes(probe, EVEN), composed(probe, there, make_batch())]
    require_equal(found, expected)


def require_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for name in mine:
            pairs = zip(tree_flatten(mine[name])[0], tree_flatten(theirs[name])[0], strict=True)
            for a, b in pairs:
                assert a.device.type == "cpu", name
                # Attention is another kernel there, and rounding with it.
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name


def two_devices() -> None:
    """The last layer on the device, or all others: the same numbers, nothing mixed."""
    here = make_policy(layers=2)
    probe = funcprobe.bind(here, max_tokens=MAX_TOKENS)
    expected = [passes(probe, make_batch()), passes(probe, EVEN)]
    for order in (("cpu", NAME), (NAME, "cpu")):
        with Device():
            there = split(make_policy(layers=2), order)
            probe = funcprobe.bind(there, max_tokens=MAX_TOKENS)
            assert probe.forward.layout == "shared", probe.forward.notes
            assert probe.forward.readout is not None
            found = [passes(probe, make_batch())]
            found += [passes(probe, EVEN)] if order[0] == "cpu" else []
            assert checks.float64_throughout(there, EVEN).passed
        require_equal(found, expected[: len(found)])


def responses_too() -> None:
    """Sampling, with the random states put back, and a model with others' parameters."""
    from funcprobe.adapters.checkpoint.model import Policy
    from funcprobe.adapters.config.schema import SamplingConfig
    from funcprobe.adapters.sampling.generate import sample_responses

    def tensor(data: Any, *, device: Any = None, **settings: Any) -> Tensor:
        """torch.tensor asks no mode; this does."""
        return torch.tensor(data, **settings).to(device or "cpu")

    config = SamplingConfig(max_new_tokens=4, generation_batch=2)
    with Device(), Replaced({torch.tensor: tensor}):
        model = taken_elsewhere(make_policy())
        policy = Policy(model, None, {}, (0,), 0, "", None, "sdpa", ())
        sample = partial(sample_responses, policy, [[1, 2, 3], [4], [5, 6]], config)
        before = torch.get_rng_state()
        first, again = sample(1).ids, sample(1).ids
        assert first == again
        assert torch.equal(before, torch.get_rng_state())
        params = funcprobe.trainable_params(model)
        other = {n: 3 * t for n, t in params.items()}
        assert forward_module.with_params(model, other, partial(sample, 1)).ids != first
        assert sample(1).ids == first


def waits_do_not_grow() -> None:
    """Waits for the device: none a token; for a tensor of the adapter once a pass, not a microbatch."""
    with Device() as device:
        probe = funcprobe.bind(taken_elsewhere(make_policy()), max_tokens=24)
        params, v = probe.params, random_like(probe.params, 1)
        calls = {
            "token_stats": lambda b: probe.token_stats(params, b),
            "weighted_grad": lambda b: probe.weighted_grad(params, b, *[coefficients(b)] * 2),
            "tangents": lambda b: probe.tangents(params, b, v),
            "alpha_vjp": lambda b: probe.alpha_vjp(params, b, v),
            "grad_dots": lambda b: probe.grad_dots(params, b, v),
            "second_tangents": lambda b: probe.second_tangents(params, b, v),
        }
        for name, call in calls.items():
            waits = []
            for copies in (1, 3):
                device.waits.clear()
                call(make_batch(copies))
                waits.append(device.waits.total())
            microbatches = len(funcprobe.policy.layout.microbatches(make_batch(3), 24, "packed"))
            assert microbatches > 2
            # Of contractions as yet a few a microbatch; the others are waited for once, at the end.
            few = 3 * microbatches if name in {"alpha_vjp", "grad_dots"} else 0
            assert waits[1] - waits[0] <= few, (name, waits)
            print(name, waits)


def heads_of_their_own() -> None:
    """In float32 no pass asks the device for attention of grouped heads; in others all do alike."""
    asked: list[tuple[torch.dtype, bool]] = []

    def listening(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked.append((query.dtype, bool(kwargs.get("enable_gqa")) or key.shape[1] != query.shape[1]))
        return scaled_dot_product_attention(query, key, value, *args, **kwargs)

    for dtype, grouped in ((torch.float32, {False}), (torch.float64, {True})):
        with Device():
            probe = funcprobe.bind(taken_elsewhere(make_policy(dtype)))
            v = random_like(probe.params, 1)
            for call in (
                probe.token_stats,
                partial(probe.tangents, direction=v),
                partial(probe.weighted_grad, p_NR=coefficients(EVEN), q_NR=coefficients(EVEN)),
                partial(probe.second_tangents, direction=v),
            ):
                asked.clear()
                with Replaced({scaled_dot_product_attention: listening}):
                    call(probe.params, EVEN)
                assert {kind for kind, _ in asked} == {dtype}
                assert {by_group for _, by_group in asked} == grouped


def planted() -> None:
    """A tensor left on the CPU is found; a single number there may meet the device's, as with CUDA."""
    with Device():
        probe = funcprobe.bind(taken_elsewhere(make_policy()))

        def hidden(params: funcprobe.Params, rows: Any) -> Tensor:
            out = probe.forward.hidden(params, rows)
            return out * torch.tensor(1.0) * torch.ones(out.shape[-1])

        with pytest.raises(MixedError, match=r"mul.*, of shape \(16,\)"):
            funcprobe.token_stats(probe.params, make_batch(), probe.forward._replace(hidden=hidden))


IN_A_PROCESS = {f.__name__: f for f in (all_of_the_core, two_devices, responses_too)}
IN_A_PROCESS |= {f.__name__: f for f in (waits_do_not_grow, heads_of_their_own, planted)}


def main() -> None:
    """All of them, or the one that is named, in this process."""
    forward_module.refuse_unsupported = lambda _: None  # which takes a subclass for packed weights
    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    for name in sys.argv[1:] or IN_A_PROCESS:
        IN_A_PROCESS[name]()
        print(name, "passed")


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices of Python's own",
)
def test_a_device_that_is_not_the_cpu():
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("passed") == len(IN_A_PROCESS)


if __name__ == "__main__":
    main()
