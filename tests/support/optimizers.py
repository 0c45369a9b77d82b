"""Optimizers in use, and what is read from their files held against them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from funcprobe.adapters.optimizer import read_adam_state
from funcprobe.types import InputError, Params
from support.small_lora import registry, trainable


def take_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, n: int = 2) -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 9]])
    for _ in range(n):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def assert_attached(adam, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Bit for bit what the live optimizer holds for the parameter of that name."""
    live = {name: optimizer.state[p] for name, p in trainable(model).items()}
    for key, found in (("exp_avg", adam.exp_avg), ("exp_avg_sq", adam.exp_avg_sq)):
        assert list(found) == sorted(live)
        for name, tensor in found.items():
            assert torch.equal(tensor, live[name][key]), (key, name)
            assert tensor.dtype == live[name][key].dtype
    assert adam.step == {name: int(entry["step"]) for name, entry in live.items()}
    assert all(type(step) is int for step in adam.step.values())
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    params = dict(model.named_parameters())
    assert sorted(n for group in adam.groups for n in group.names) == sorted(live)
    for group in adam.groups:
        for name in group.names:
            saved = group_of[id(params[name])]
            assert group[1:] == (saved["lr"], *saved["betas"], saved["eps"], saved["weight_decay"])


def read(path: Path, model: torch.nn.Module, params: Params, **options: Any):
    """By position, where that is all there is: most files here have equal shapes."""
    return read_adam_state(path, model, params, **{"accept_positional": True, **options})


def refused(match: str, path: Path, model: torch.nn.Module, **options: Any) -> str:
    with pytest.raises(InputError, match=match) as caught:
        read(path, model, registry(model), **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(str(path))
    return message
