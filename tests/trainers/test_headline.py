"""Who makes a step's change: parts by projection and layer, and one line in percent or in amounts."""

import types

import pytest
import torch

from funcprobe.adapters.trainers.headline import causes, headline
from funcprobe.statistics.intervals import Interval
from funcprobe.step.adam import UpdateDirection

NAMES = {
    "base_model.model.model.layers.2.mlp.down_proj.lora_A.default.weight": 1.0,
    "base_model.model.model.layers.2.mlp.down_proj.lora_B.default.weight": 2.0,
    "base_model.model.model.layers.10.mlp.down_proj.lora_A.default.weight": 3.0,
    "base_model.model.model.layers.10.self_attn.q_proj.lora_A.default.weight": -1.5,
    "base_model.model.lm_head.modules_to_save.default.weight": 0.5,
}


def found(momentum: float, update: float, decay: float = 0.0, names=NAMES):
    """Of a derivative of 5: X is 1, and v has two equal entries in each tensor."""
    v = {n: torch.full((2,), part / 2) for n, part in names.items()}
    X = {n: torch.ones(2) for n in names}
    whole = momentum + update + decay
    along = types.SimpleNamespace(X=X, bars_dot=whole, from_momentum=momentum)
    parts = causes(along, UpdateDirection(v, v, v, v, 1.0), 0.1)
    return parts | {
        "predicted": 0.1 * whole,
        "from_momentum": 0.1 * momentum,
        "from_update": 0.1 * update,
        "from_decay": 0.1 * decay,
        "entropy": 2.0,
    }


def test_parts_by_projection_and_the_largest_layer():
    made = found(4.0, 1.0)
    expected = {"down_proj": 0.6, "q_proj": -0.15, "lm_head": 0.05}
    for name, part in expected.items():
        assert made[f"from_projection/{name}"] == pytest.approx(part)
    assert (made["top_layer"], made["from_top_layer"]) == (2.0, pytest.approx(0.3))
    assert made["momentum_share"] == 0.8


def test_the_line_in_percent_and_in_amounts():
    said = headline(found(4.0, 1.0), Interval(0.4, 0.6))
    assert said == (
        "entropy +25.0 % by this step (95 % over E: +20.0 to +30.0), it rises; momentum 80 %, this "
        "batch 20 %; most in down_proj +6.0e-01, layer 2 +3.0e-01"
    )
    alike = {n: abs(part) / 8 for n, part in NAMES.items()}
    said = headline(found(0.5, 0.4, 0.1, names=alike), Interval(-0.1, 1.1))
    assert said.startswith("entropy +5 % by this step (95 % over E: -5 to +55), sign not established; ")
    assert (
        "momentum 50 %, this batch 40 %, weight decay 10 %; most in down_proj 75 %, layer 10 56 %"
        in said
    )
    said = headline(found(-4.0, 9.0), Interval(0.4, 0.6))
    assert "momentum -4.0e-01, this batch +9.0e-01, weight decay +0.0e+00; most in" in said


def test_a_layer_that_others_oppose_is_an_amount():
    one = {f"model.layers.{i}.q_proj.lora_A.default.weight": x for i, x in enumerate((9.0, -8.0))}
    said = headline(found(0.6, 0.4, names=one), Interval(0.4, 0.6))
    assert said.endswith("most in q_proj 100 %, layer 0 +9.0e-01")


def test_no_change_and_no_layers():
    alone = {"lm_head.weight": 0.0}
    made = found(0.0, 0.0, names=alone)
    assert not made.keys() & {"momentum_share", "top_layer", "from_top_layer"}
    assert headline(made, Interval(-0.1, 0.1)).endswith(
        "weight decay +0.0e+00; most in lm_head +0.0e+00"
    )
