"""float32 islands: each that is planted is named, and no supported architecture has any."""

from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.qwen2 import modeling_qwen2
from transformers.utils import ModelOutput

from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.policy import islands
from funcprobe.policy.islands import float32_islands
from funcprobe.types import InputError
from support.architectures import ARCHITECTURES, BATCH, CPU, lora_config, save_adapter, save_base
from support.policies import tiny_policy

TOKENS_NL = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
BASE = "base_model.model"
FIRST, LAST = f"{BASE}.model.layers.0", f"{BASE}.model.layers.1"


def names(model, tokens_NL=TOKENS_NL):
    return [island.module for island in float32_islands(model, tokens_NL)]


def through(dtype, x):
    """Rounded to `dtype` and back, past the mode that would keep float64."""
    if isinstance(x, tuple):
        return tuple(through(dtype, part) for part in x)
    with torch._C.DisableTorchFunction():
        return x.to(dtype).to(x.dtype)


def plant(model, name, dtype=torch.float32):
    """Round what a module returns; the module to mend it."""
    module = model.get_submodule(name)
    own = module.forward
    module.forward = lambda *args, **kwargs: through(dtype, own(*args, **kwargs))
    return module


PLACES = [
    f"{BASE}.model.embed_tokens",
    f"{BASE}.model.rotary_emb",
    f"{FIRST}.input_layernorm",
    f"{FIRST}.self_attn.q_proj",
    f"{FIRST}.self_attn.q_proj.base_layer",
    f"{FIRST}.self_attn.v_proj.lora_A.default",
    f"{FIRST}.self_attn.o_proj.lora_B.default",
    f"{FIRST}.mlp.act_fn",
    f"{LAST}.post_attention_layernorm",
    f"{LAST}.mlp",
    LAST,
    f"{BASE}.model.norm",
    f"{BASE}.lm_head",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_a_planted_cast_is_named(place, dtype):
    model = tiny_policy()
    assert names(model) == []
    plant(model, place, dtype)
    (island,) = float32_islands(model, TOKENS_NL)
    assert island.module == place
    assert island.kind == type(model.get_submodule(place)).__name__
    assert island.error > 0.1  # the bound is 1e-3


def rounded_rotation(monkeypatch):
    own = modeling_qwen2.apply_rotary_pos_emb

    def apply(q, k, cos, sin, *args):
        return own(q, through(torch.float32, k), cos, sin, *args)

    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", apply)


def rounded_softmax(monkeypatch):
    def softmax(x, *args, **kwargs):
        return through(torch.float32, torch.softmax(x, -1))

    monkeypatch.setattr(nn.functional, "softmax", softmax)


@pytest.mark.parametrize("planted", [rounded_rotation, rounded_softmax])
def test_a_cast_between_the_modules_is_named_by_the_module_around(planted, monkeypatch):
    model = tiny_policy(attn_implementation="eager")
    assert names(model) == []
    planted(monkeypatch)
    # Values are exact there, and weights or keys are not: part of the response is lost, not all.
    assert names(model) == [f"{FIRST}.self_attn"]


def test_islands_side_by_side_are_both_named_and_one_behind_another_later():
    model = tiny_policy()
    first = [plant(model, f"{FIRST}.self_attn.{n}_proj") for n in "qv"]
    behind = plant(model, f"{LAST}.mlp.act_fn")
    assert names(model) == [f"{FIRST}.self_attn.q_proj", f"{FIRST}.self_attn.v_proj"]
    for module in first:
        del module.forward
    assert names(model) == [f"{LAST}.mlp.act_fn"]
    del behind.forward
    assert names(model) == []


def test_the_bound_is_far_from_either_side(monkeypatch):
    model = tiny_policy()
    # Rounding leaves 1e-16 / 1e-10, and some of it grows on the way.
    monkeypatch.setattr(islands, "BOUND", 2e-5)
    assert names(model) == []
    plant(model, f"{FIRST}.mlp")
    monkeypatch.setattr(islands, "BOUND", 0.1)
    assert names(model) == [f"{FIRST}.mlp"]


def test_a_cast_of_a_trained_weight_is_named():
    model = tiny_policy()
    place = f"{LAST}.mlp.up_proj.lora_A.default"
    factor = model.get_submodule(place)
    factor.forward = lambda x: nn.functional.linear(x, through(torch.float32, factor.weight))
    assert names(model) == [place]


def test_an_untrained_adapter_is_reached():
    model = tiny_policy()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    assert names(model) == []
    plant(model, f"{LAST}.mlp.up_proj.lora_A.default")
    assert names(model) == [f"{LAST}.mlp.up_proj.lora_A.default"]


def test_a_token_whose_embedding_is_zero_is_no_island():
    """RMSNorm is far from straight within 1e-10 of it."""
    model = tiny_policy(rms_norm_eps=1e-20)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = 0  # the first token of the second row
    assert names(model) == []


def test_a_derivative_that_is_not_its_own_is_named():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, x):
            return 1.01 * x

    model = tiny_policy()
    module = model.get_submodule(f"{FIRST}.mlp.act_fn")
    own = module.forward
    module.forward = lambda x: Doubled.apply(own(x))
    (island,) = float32_islands(model, TOKENS_NL)
    assert island.module == f"{FIRST}.mlp.act_fn"
    # |f'| / 100 over |f'| + |f|, and |f| is not the larger
    assert 0.003 < island.error < 0.01


# Supported architectures


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory):
    def load(architecture, dtype="float64", attention="auto"):
        folder = tmp_path_factory.mktemp(architecture)
        base = save_base(architecture, folder / "base")
        plain = AutoModelForCausalLM.from_pretrained(base)
        save_adapter(plain, lora_config(architecture, "all-linear"), base, folder / "adapter")
        given = {"checkpoint": str(folder / "adapter"), "dtype": dtype, "attention": attention}
        return load_policy(PolicyConfig.model_validate(given), CPU).model

    return load


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_supported_architecture_has_one(policy_of, architecture, attention, monkeypatch):
    model = policy_of(architecture, attention=attention)
    assert names(model, BATCH.tokens_NL) == []
    # Hugging Face's own code is full of them; GPT-2's, and it alone, asks for float32 nowhere.
    monkeypatch.setattr(islands, "arithmetic_of", lambda tensors: nullcontext())
    found = float32_islands(model, BATCH.tokens_NL)
    kinds = [island.kind for island in found]
    if architecture == "gpt2":
        assert kinds == []
    else:
        assert len(kinds) == 2
        assert kinds[0].endswith("RotaryEmbedding")
        assert kinds[1].endswith("RMSNorm")
        assert found[1].module == f"{FIRST}.input_layernorm"


# What models hand around


class Toy(nn.Module):
    """An embedding, then `inner`, which gets and gives what it likes."""

    def __init__(self, inner):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.inner = inner
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("nothing", torch.zeros(0))
        self.double()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        assert not use_cache
        x = self.embedding(input_ids)
        return self.inner({"x": [x, input_ids]}, mask=self.mask, nothing=None)


class Inner(nn.Module):
    def __init__(self, gives):
        super().__init__()
        self.gives = gives

    def forward(self, given, mask, nothing):
        x = given["x"][0]
        return self.gives(x, x.exp(), through(torch.float32, x.exp()), mask)


STRUCTURES = {
    "tensor": lambda x, f, i, mask: i,
    "tuple": lambda x, f, i, mask: (f, None, i),
    "nested": lambda x, f, i, mask: (f, {"a": [f, (i,)], "b": 3}),
    "ordered": lambda x, f, i, mask: OrderedDict(z=f, a=i),
    "output": lambda x, f, i, mask: ModelOutput(first=f, last=i),
    "output in a tuple": lambda x, f, i, mask: (mask, ModelOutput(first=(f, i))),
    "complex": lambda x, f, i, mask: torch.complex(f, i),
    "with an infinite mask": lambda x, f, i, mask: (mask, i),
    "narrow": lambda x, f, i, mask: x.bfloat16(),
    "not a number": lambda x, f, i, mask: (f, (f - 99).sqrt()),
}


@pytest.mark.parametrize("gives", STRUCTURES.values(), ids=STRUCTURES)
def test_an_island_is_found_in_whatever_a_module_gives(gives):
    model = Toy(Inner(gives))
    assert names(model) == ["inner"]
    model.inner.gives = lambda x, f, i, mask: gives(x, f, f, mask)  # the same without the cast
    expected = {STRUCTURES["narrow"]: ["inner"], STRUCTURES["not a number"]: ["inner"]}
    assert names(model) == expected.get(gives, [])


def test_what_does_not_respond_is_no_island():
    constant = torch.tensor([1 / 3, 2.0]).double()
    integers = Toy(Inner(lambda x, f, i, mask: (constant, x > 0, x.argmax(-1), mask, f)))
    assert names(integers) == []
    # 1 or -1, whatever x is: response and derivative are both rounding.
    assert names(Toy(Inner(lambda x, f, i, mask: x / (x * x).sqrt()))) == []
    staircase = Toy(Inner(lambda x, f, i, mask: through(torch.float16, x)))
    assert names(staircase) == ["inner"]


class Around(nn.Module):
    """Changes in place what the module inside gave."""

    def __init__(self, change):
        super().__init__()
        self.inside = Inner(lambda x, f, i, mask: f)
        self.change = change

    def forward(self, *args, **kwargs):
        return self.change(self.inside(*args, **kwargs))


def test_what_is_changed_in_place_afterwards_is_not_laid_at_the_module_inside():
    assert names(Toy(Around(lambda y: y.mul_(1 / 3)))) == []
    assert names(Toy(Around(lambda y: y.copy_(through(torch.float32, y))))) == ["inner"]


# What it refuses, and what it leaves alone


def test_a_model_in_float32_is_refused(policy_of):
    with pytest.raises(InputError, match=r"is torch.float32, float64 is expected.*double\(\)") as no:
        float32_islands(policy_of("llama", dtype="float32"), TOKENS_NL)
    assert "\n" not in str(no.value)
    half = tiny_policy()
    half.get_submodule(f"{LAST}.mlp.up_proj.base_layer").bfloat16()
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.base_layer.weight is torch.bfloat16"):
        float32_islands(half, TOKENS_NL)


def test_a_forward_without_forward_mode_is_refused():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, y):
            return y

    with pytest.raises(InputError, match="the model has no forward-mode derivative") as no:
        names(Toy(Inner(lambda x, f, i, mask: Opaque.apply(x))))
    assert "\n" not in str(no.value)


def test_a_forward_that_takes_another_way_is_refused():
    calls = iter(range(9))

    def routed(x, f, i, mask):
        return x[: 1 + next(calls) % 2]

    with pytest.raises(InputError, match="calls other modules") as no:
        names(Toy(Inner(routed)))
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = tiny_policy()
    kept = model.register_forward_hook(lambda *_: None)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    state = torch.get_rng_state()
    if fails:
        model.get_submodule(f"{LAST}.mlp").forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            float32_islands(model, TOKENS_NL)
    else:
        assert names(model) == []
    assert [len(m._forward_hooks) for m in model.modules() if m._forward_hooks] == [1]
    kept.remove()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [t._version for t in (*model.parameters(), *model.buffers())] == versions
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
