"""Layers on the CPU and on a device: `pytest --device cuda -m device`; all on the CPU by default.

accelerate's hooks move hidden states between them; what is expected is the model on the CPU alone.
"""

from typing import Any

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch.utils._pytree import tree_flatten

import funcprobe
from funcprobe import checks
from support.builders import BATCH
from support.policies import random_like, tiny_policy


@pytest.fixture(scope="module")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


def split(model: Any, first: torch.device, last: torch.device) -> Any:
    """The last layer and its norm on another device than the embeddings."""
    base = model.get_base_model()
    places = {"model.embed_tokens": first, "model.rotary_emb": first, "lm_head": first}
    places |= {"model.layers.0": first, "model.layers.1": last, "model.norm": last}
    offload = dict.fromkeys(places, False)
    attach_align_device_hook_on_blocks(base, {"": first} | places, offload=offload)
    assert {p.device.type for p in model.parameters()} == {first.type, last.type}
    return model


def passes(model: Any) -> dict[str, Any]:
    probe = funcprobe.bind(model, max_tokens=24)
    params, v = probe.params, random_like(probe.params)
    mask_NR = funcprobe.response_mask(BATCH).double()
    assert probe.forward.layout == "shared"
    assert probe.forward.readout is not None
    return {
        "token_stats": probe.token_stats(params, BATCH),
        "weighted_grad": probe.weighted_grad(params, BATCH, mask_NR, mask_NR),
        "tangents": probe.tangents(params, BATCH, v),
        "alpha_vjp": probe.alpha_vjp(params, BATCH, v),
        "grad_dots": probe.grad_dots(params, BATCH, v),
        "second_tangents": probe.second_tangents(params, BATCH, v),
        "kl": funcprobe.kl_along(
            params, funcprobe.base_params(model, params), BATCH, v, probe.forward, (1e-3,)
        ),
        "measured": probe.measure(params, BATCH, v, 1e-3, probe.token_stats(params, BATCH)).influence_N,
    }


@pytest.mark.device
@pytest.mark.parametrize("first_is_the_cpu", [True, False])
def test_every_pass_of_a_split_model(device, first_is_the_cpu) -> None:
    expected = passes(tiny_policy())
    places = (torch.device("cpu"), device)
    model = split(tiny_policy(), *(places if first_is_the_cpu else places[::-1]))
    found = passes(model)
    for name, tensors in expected.items():
        for a, b in zip(tree_flatten(found[name])[0], tree_flatten(tensors)[0], strict=True):
            assert a.device.type == "cpu"
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name  # float64, summed in another order
    assert checks.float64_throughout(model, BATCH).passed
