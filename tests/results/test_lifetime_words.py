"""What a batch does later, in words: nothing without momentum, amounts at the next learning rate."""

import pytest

from funcprobe.adapters.results.lifetime import LifetimeSection, lifetime_lines
from funcprobe.adapters.results.quantity import quantity


def test_the_line():
    made = LifetimeSection(now=-12.0, later=-108.0, factor=9.0)
    assert lifetime_lines(made, quantity(1e-3, "learning rate", ""), "nats per token") == [
        "This batch: -1.20e-02 in this step, -1.08e-01 more in later steps through momentum, if "
        "nothing else changes (nats per token at lr 0.001)"
    ]
    (line,) = lifetime_lines(made, quantity(1e-3, "learning rate", ""), "nats per token", " (*)")
    assert "-1.20e-02 in this step (*), -1.08e-01 more in later steps through momentum (*), if" in line
    (line,) = lifetime_lines(made, quantity(0.0, "learning rate", ""), "nats per token")
    assert "-1.20e+01 in this step" in line
    assert line.endswith("(nats per token per unit of learning rate)")


@pytest.mark.parametrize("now", [0.0, 3.0])
def test_no_line_without_momentum(now):
    made = LifetimeSection(now=now, later=0.0, factor=0.0)
    lr = quantity(1e-3, "learning rate", "")
    assert (
        lifetime_lines(made, lr, "nats per token") == lifetime_lines(None, lr, "nats per token") == []
    )
