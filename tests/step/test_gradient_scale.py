"""The size of a gradient against Adam's second moment, against a loop."""

import math

import pytest
import torch

import funcprobe
from funcprobe.types import AdamGroup, AdamState

GROUPS = (
    AdamGroup(("a", "b"), 1e-3, 0.9, 0.99, 1e-3, 0.0),
    AdamGroup(("c", "d"), 1e-3, 0.9, 0.9, 1e-8, 0.0),
)


def state(**nu: list[float]) -> AdamState:
    moments = {name: torch.tensor(values, dtype=torch.float64) for name, values in nu.items()}
    return AdamState({}, moments, {"a": 3, "b": 1, "c": 2}, GROUPS)


def test_against_a_loop() -> None:
    nu = {"a": [4e-8, 1e-4, 0.0], "b": [1e-4, 9.0, 1.0], "c": [0.3, 0.2, 2.0], "d": [0.0, 0.0, 0.0]}
    Y = {
        "a": torch.tensor([0.1, -0.2, 0.3]),
        "b": torch.tensor([1.0, -2.0, 70.0]),
        "c": torch.tensor([5.0, 6.0, -7.0]),
        "d": torch.ones(3),
    }
    found = funcprobe.gradient_scale(Y, state(**nu), clip=0.5)
    ratio, beyond, below = {}, 0, 0
    for group in GROUPS:
        for name in set(group.names) - {"d"}:  # without second moments
            hat = [x / (1 - group.beta2 ** {"a": 3, "b": 1, "c": 2}[name]) for x in nu[name]]
            g = [0.5 * x for x in Y[name].tolist()]
            ratio[name] = math.sqrt(sum(x * x for x in g) / sum(hat))
            beyond += sum(abs(x) > 10 * math.sqrt(h) for x, h in zip(g, hat, strict=True))
            below += sum(math.sqrt(h) < group.eps for h in hat)
    # float32 holds the gradients to 6e-8
    assert found.ratio == pytest.approx(ratio, rel=1e-6)
    assert found.median == pytest.approx(sorted(ratio.values())[1], rel=1e-6)
    assert (found.beyond_ten, found.below_eps) == (beyond / 9, below / 9)
    assert beyond > 0
    assert below == 1  # the entry of 0: the root of 4e-8 / (1 - 0.99^3) is 1.2e-3, above eps
