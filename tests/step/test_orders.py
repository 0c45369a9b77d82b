"""Other orders of parameters, on a model of twelve layers."""

import pytest

from funcprobe.step.orders import other_orders

LAYERS, MODULES = range(12), ("q_proj", "k_proj", "v_proj", "o_proj")


def name(layer: int, module: str, factor: str) -> str:
    return f"model.layers.{layer}.self_attn.{module}.lora_{factor}.default.weight"


ORDER = [name(layer, m, f) for layer in LAYERS for m in MODULES for f in "AB"]
ALIKE = dict.fromkeys(ORDER, (4, 4))


def filed(actual: list[str]) -> dict[str, str]:
    """Under which name the k-th state of the actual order is filed."""
    return dict(zip(actual, ORDER, strict=True))


@pytest.mark.parametrize(
    ("what", "actual"),
    [
        ("the names sorted as text", sorted(ORDER)),
        (
            "the layers in the order of their numbers as text",
            [name(x, m, f) for x in sorted(LAYERS, key=str) for m in MODULES for f in "AB"],
        ),
        ("the layers reversed", [name(x, m, f) for x in LAYERS[::-1] for m in MODULES for f in "AB"]),
        (
            "the modules of a layer in alphabetical order",
            [name(x, m, f) for x in LAYERS for m in sorted(MODULES) for f in "AB"],
        ),
        (
            "the modules of a layer reversed",
            [name(x, m, f) for x in LAYERS for m in MODULES[::-1] for f in "AB"],
        ),
        (
            "module by module over all layers",
            [name(x, m, f) for m in MODULES for x in LAYERS for f in "AB"],
        ),
        ("lora_B before lora_A", [name(x, m, f) for x in LAYERS for m in MODULES for f in "BA"]),
        (
            "all lora_A before all lora_B",
            [name(x, m, f) for f in "AB" for x in LAYERS for m in MODULES],
        ),
        (
            "all lora_B before all lora_A",
            [name(x, m, f) for f in "BA" for x in LAYERS for m in MODULES],
        ),
    ],
)
def test_an_order_of_names(what: str, actual: list[str]) -> None:
    assert other_orders([ORDER], ALIKE)[what] == filed(actual)


def test_exchanges() -> None:
    found = other_orders([ORDER], ALIKE)
    swap = {"q_proj": "o_proj", "o_proj": "q_proj"}
    expected = {
        name(x, m, f): name(x, swap.get(m, m), f) for x in LAYERS for m in MODULES for f in "AB"
    }
    assert found["q_proj and o_proj exchanged"] == expected
    layers = {3: 10, 10: 3}
    expected = {
        name(x, m, f): name(layers.get(x, x), m, f) for x in LAYERS for m in MODULES for f in "AB"
    }
    assert found["layers 3 and 10 exchanged"] == expected
    expected = {name(x, m, f): name((x + 1) % 12, m, f) for x in LAYERS for m in MODULES for f in "AB"}
    assert found["the layers shifted by one"] == expected


def test_all_are_pairings_of_equal_shape_other_than_the_assumed_and_each_other() -> None:
    shapes = {
        n: (4, 8) if "lora_A" in n else (6 if "k_proj" in n or "v_proj" in n else 8, 4) for n in ORDER
    }
    found = other_orders([ORDER], shapes)
    assert "k_proj and v_proj exchanged" in found
    assert "q_proj and k_proj exchanged" not in found  # their lora_B differ
    assert "lora_B before lora_A" not in found
    identity = {n: n for n in ORDER}
    for pairing in found.values():
        assert sorted(pairing) == sorted(pairing.values()) == sorted(ORDER)
        assert pairing != identity
        assert all(shapes[n] == shapes[other] for n, other in pairing.items())
    assert len({tuple(pairing[n] for n in ORDER) for pairing in found.values()}) == len(found)


def test_groups() -> None:
    """A group without weight decay may come first."""
    groups = [["a.weight", "b.weight"], ["c.weight"]]
    found = other_orders(groups, dict.fromkeys(["a.weight", "b.weight", "c.weight"], (4,)))
    assert found["the groups reversed"] == {
        "c.weight": "a.weight",
        "a.weight": "b.weight",
        "b.weight": "c.weight",
    }


def test_a_model_without_layers_has_no_other_order() -> None:
    assert other_orders([["w.weight"]], {"w.weight": (3,)}) == {}
    assert other_orders([], {}) == {}
