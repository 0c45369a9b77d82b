"""Which module, layer, projection and factor a tensor of the registry belongs to, by its name."""

import pytest
import torch

import funcprobe
from funcprobe import AdamGroup, Step
from funcprobe.attribution.module_shares import factor_of, layer_of, module_of, module_shares
from support.policies import random_like

QWEN = "base_model.model.model.layers.11.self_attn.q_proj"
EXPERTS = "base_model.model.model.layers.3.mlp.experts"


@pytest.mark.parametrize(
    ("name", "module", "layer", "factor"),
    [
        (f"{QWEN}.lora_A.default.weight", QWEN, "base_model.model.model.layers.11", "A"),
        (f"{QWEN}.lora_B.default.bias", QWEN, "base_model.model.model.layers.11", "B"),
        (
            f"{QWEN}.lora_magnitude_vector.default.weight",
            QWEN,
            "base_model.model.model.layers.11",
            "lora_magnitude_vector",
        ),
        (
            f"{EXPERTS}.7.up_proj.lora_A.default.weight",
            f"{EXPERTS}.7.up_proj",
            "base_model.model.model.layers.3",
            "A",
        ),
        (
            f"{EXPERTS}.base_layer.lora_B.default.weight",
            EXPERTS,
            "base_model.model.model.layers.3",
            "B",
        ),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A.default",
            "base_model.model.model.embed_tokens",
            "base_model.model.model.embed_tokens",
            "A",
        ),
        (
            "base_model.model.lm_head.modules_to_save.default.weight",
            "base_model.model.lm_head",
            "base_model.model.lm_head",
            "weight",
        ),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj", "model.layers.0", "weight"),
        ("transformer.h.4.attn.c_attn.bias", "transformer.h.4.attn.c_attn", "transformer.h.4", "bias"),
        ("model.norm.weight", "model.norm", "model.norm", "weight"),
        ("scale", "scale", "scale", "scale"),
    ],
)
def test_places_of_names(name, module, layer, factor):
    assert (module_of(name), layer_of(name), factor_of(name)) == (module, layer, factor)


def test_groups_hold_the_tensors_of_their_names_in_natural_order():
    """<X, v> by a loop over entries, rule "sgd": v = Y."""
    names = [f"m.layers.{i}.{p}.lora_{f}.default.weight" for i in (10, 2) for p in "kq" for f in "AB"]
    params = {n: torch.zeros(2, 3) for n in names}
    X, Y = random_like(params, 1), random_like(params, 2)
    state = funcprobe.AdamState({}, {}, {}, (AdamGroup(tuple(names), 1e-3, 0.9, 0.99, 1e-8, 0.1),))
    found = module_shares(X, params, [Y], state, Step("sgd"))
    share = {
        n: sum(float(X[n][i, j]) * float(Y[n][i, j]) for i in range(2) for j in range(3)) for n in names
    }
    assert {n: part.update for n, part in found.tensor.items()} == pytest.approx(share, rel=1e-12)
    assert all(part.momentum == part.decay == 0 for part in found.tensor.values())
    assert list(found.layer) == ["m.layers.2", "m.layers.10"]
    assert list(found.module) == [f"m.layers.{i}.{p}" for i in (2, 10) for p in "kq"]
    parts_of_names = {"layer": "{}.", "module": "{}.", "projection": ".{}.", "factor": "lora_{}."}
    for grouping, part_of_name in parts_of_names.items():
        for group, part in getattr(found, grouping).items():
            expected = sum(s for n, s in share.items() if part_of_name.format(group) in n)
            assert part.total == pytest.approx(expected, rel=1e-12)
    assert found.total.update == pytest.approx(sum(share.values()), rel=1e-12)


def test_other_names_are_refused():
    params = {"a": torch.ones(2)}
    state = funcprobe.AdamState({}, {}, {}, (AdamGroup(("a",), 1e-3, 0.9, 0.99, 1e-8, 0.1),))
    with pytest.raises(ValueError, match="X: names do not match"):
        module_shares({"b": torch.ones(2)}, params, [params], state, Step("sgd"))
