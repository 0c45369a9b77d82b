"""Models on several devices behind accelerate's hooks; weights that are out of a process's reach.

tests/test_device_mixing.py has a split between the CPU and a device that is not it.
"""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import LayerwiseCastingHook, ModelHook, add_hook_to_module
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._pytree import tree_flatten
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import funcprobe
from funcprobe import InputError, checks
from funcprobe.policy.forward import frozen_forward, trainable_params
from funcprobe.policy.placement import twin_of
from funcprobe.policy.reach import shortened
from funcprobe.policy.reference import base_params
from support.builders import BATCH, SHAPE, built, llama, with_lora
from support.policies import random_like

OPT = OPTConfig(
    vocab_size=11,
    hidden_size=16,
    ffn_dim=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
    word_embed_proj_dim=16,
)


def placed(base):
    """accelerate's hooks on every part, all on the CPU: only moving is left out."""
    parts = [name for name, _ in base.named_modules() if ".layers." not in name and "." in name]
    layers = [f"{name}.{i}" for name in parts if name.endswith("layers") for i in (0, 1)]
    parts = [name for name in parts if not name.endswith("layers")]
    children = [name for name, _ in base.named_children() if not any(p.startswith(name) for p in parts)]
    dispatch_model(base, dict.fromkeys([*parts, *layers, *children], "cpu"), force_hooks=True)
    assert "_hf_hook" in vars(base.get_output_embeddings())
    return base


def twice(kind, config, **lora):
    """The same policy, without hooks and with them."""
    return [
        built(lambda dtype, place=place: with_lora(place(kind(config)), dtype, **lora))
        for place in (lambda base: base, placed)
    ]


POLICIES = {
    "tied, windows": (
        MistralForCausalLM,
        MistralConfig(**SHAPE, sliding_window=3, tie_word_embeddings=True),
        {},
    ),
    "head": (LlamaForCausalLM, LlamaConfig(**SHAPE), {"modules_to_save": ["lm_head"]}),
    "tokens": (LlamaForCausalLM, LlamaConfig(**SHAPE), {"trainable_token_indices": [3, 7]}),
}


def passes(model):
    """Every primitive of the core."""
    probe = funcprobe.bind(model, max_tokens=24)
    params, v = probe.params, random_like(probe.params)
    mask_NR = funcprobe.response_mask(BATCH).double()
    reference = base_params(model, params)
    return probe.forward, {
        "token_stats": probe.token_stats(params, BATCH),
        "weighted_grad": probe.weighted_grad(params, BATCH, mask_NR, mask_NR),
        "tangents": probe.tangents(params, BATCH, v),
        "alpha_vjp": probe.alpha_vjp(params, BATCH, v),
        "grad_dots": probe.grad_dots(params, BATCH, v),
        "second_tangents": probe.second_tangents(params, BATCH, v),
        "kl": funcprobe.kl_along(params, reference, BATCH, v, probe.forward, (1e-3,)),
    }


@pytest.mark.parametrize("case", POLICIES)
def test_behind_hooks_every_primitive_is_the_same_to_the_bit(case):
    kind, config, lora = POLICIES[case]
    (plain, expected), (hooked, found) = (passes(model) for model in twice(kind, config, **lora))
    assert hooked.layout == plain.layout
    assert (hooked.readout is None) == (plain.readout is None)
    assert hooked.notes == plain.notes
    for name, tensors in expected.items():
        for a, b in zip(tree_flatten(tensors)[0], tree_flatten(found[name])[0], strict=True):
            assert torch.equal(a, b), name


def test_the_precision_of_a_model_behind_hooks_is_found():
    _, hooked = twice(LlamaForCausalLM, LlamaConfig(**SHAPE))
    assert checks.float64_throughout(hooked, BATCH).passed


def test_a_decoder_inside_a_base_model_behind_hooks():
    """Containers on the way to the backbone are copied, and their replaced forwards with them."""
    model = built(lambda dtype: with_lora(OPTForCausalLM(OPT), dtype, ["q_proj", "fc1"]))
    expected = funcprobe.bind(model).token_stats(trainable_params(model), BATCH)
    base = model.get_base_model()
    for module in base.modules():
        add_hook_to_module(module, ModelHook())
    found = funcprobe.bind(model).token_stats(trainable_params(model), BATCH)
    # An embedding behind a hook has no readout in closed form, whose route rounds otherwise.
    torch.testing.assert_close(found.logp_NR, expected.logp_NR, rtol=0, atol=1e-14)


@torch.no_grad()
def test_a_copy_calls_its_own_forward():
    layer = add_hook_to_module(nn.Linear(2, 2), ModelHook())
    twin = twin_of(layer)
    vars(twin)["_parameters"] = {"weight": nn.Parameter(torch.zeros(2, 2)), "bias": None}
    assert float(twin(torch.ones(2)).abs().sum()) == 0 < float(layer(torch.ones(2)).abs().sum())
    backbone = placed(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=9))).model
    add_hook_to_module(backbone, ModelHook())
    tokens = torch.arange(5)[None]
    short, own = (
        m(tokens, use_cache=False).last_hidden_state for m in (shortened(backbone, 2), backbone)
    )
    assert float((short - own)[0, -1].abs().max()) > 1e-4  # a window of two tokens, not of nine


def test_a_hook_that_does_more_than_move_leaves_the_embedding_to_it():
    class Halving(ModelHook):
        def post_forward(self, module, output):
            return output / 2

    model = built(llama)
    add_hook_to_module(model.get_output_embeddings(), Halving())
    forward = funcprobe.bind(model).forward
    assert forward.readout is None


def refused(model, match):
    with pytest.raises(InputError, match=match) as caught:
        funcprobe.bind(model)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=match):
        frozen_forward(model, trainable_params(model))


def test_offloaded_weights_are_refused():
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    cpu_offload(base, execution_device="cpu")
    refused(base.eval(), r"is offloaded: accelerate's AlignDevicesHook .* or all on the CPU")


def test_weights_that_are_cast_at_each_call_are_refused():
    model = built(llama)
    casting = LayerwiseCastingHook(torch.bfloat16, torch.float32, non_blocking=False)
    add_hook_to_module(model.get_base_model().model.norm, casting)
    refused(model, "model.norm is offloaded: accelerate's LayerwiseCastingHook")


def test_weights_without_values_are_refused():
    model = built(llama)
    model.get_base_model().model.norm.to("meta")
    refused(model, r"norm\.weight is on the meta device, without values")


def test_zero_3_is_refused():
    model = built(llama)
    next(model.parameters()).ds_id = 0  # as deepspeed.zero marks what it has partitioned
    refused(model, "partitioned by DeepSpeed's ZeRO-3.*torchrun")


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_replica_is_probed_and_a_shard_refused():
    """The module in DistributedDataParallel is the policy; FSDP's and tensor parallel ones are not."""
    model = built(llama)
    expected = funcprobe.bind(model)
    replica = nn.parallel.DistributedDataParallel(model)
    probe = funcprobe.bind(replica)
    assert probe.params.keys() == expected.params.keys()
    found, known = (p.token_stats(p.params, BATCH) for p in (probe, expected))
    assert torch.equal(found.logp_NR, known.logp_NR)
    assert checks.float64_throughout(replica, BATCH).passed

    mesh = init_device_mesh("cpu", (1,))
    sharded = built(llama)
    fully_shard(sharded, mesh=mesh)
    refused(sharded, r"is a DTensor \(S\(0\)\) over 1 processes, as FSDP2.*device_map")
    parallel = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    parallelize_module(parallel.model.layers[0].mlp, mesh, {"up_proj": ColwiseParallel()})
    refused(parallel, r"up_proj\.weight is a DTensor")
