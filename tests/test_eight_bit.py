"""States of real bitsandbytes optimizers, made on the CPU, against what bitsandbytes reads in them."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from small_lora import make_model, registry, trainable, trainer_run

from funcprobe.adapters.optimizer import live_adam_state, read_adam_state
from funcprobe.adapters.optimizer.eight_bit import dequantised
from funcprobe.adapters.optimizer.saved import require_adam
from funcprobe.adapters.optimizer.torch_file import well_formed
from funcprobe.step.adam import update_direction
from funcprobe.types import InputError

NESTED = "__bnb_optimizer_quant_state__"
EPS = torch.finfo(torch.float32).eps
TOKENS = torch.tensor([[1, 2, 3, 4, 9], [5, 6, 7, 8, 9]])


def wide_model(seed: int = 0) -> torch.nn.Module:
    """Eight of twelve tensors have 4,800 elements, which is 18.75 blocks; v_proj's lora_B and
    down_proj's lora_A are under min_8bit_size."""
    return make_model(seed=seed, hidden_size=200, r=24)


def backward(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> None:
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()


def stepped(make: Any, steps: int = 3, **options: Any) -> SimpleNamespace:
    model = wide_model()
    optimizer = make(trainable(model).values(), **{"lr": 1e-3, **options})
    for i in range(steps):
        backward(model, (TOKENS + i) % 11)
        optimizer.step()
    return SimpleNamespace(model=model, optimizer=optimizer)


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """As bitsandbytes up to 0.49.1 wrote it, without the nesting; made from what it writes now."""
    entries = {}
    for key, entry in state["state"].items():
        entries[key] = {k: v for k, v in entry.items() if k != NESTED} | entry.get(NESTED, {})
    return state | {"state": entries}


def saved(state: dict[str, Any]) -> Any:
    return well_formed(Path("optimizer.pt"), state, "torch.optim")


def write(state: object, tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "optimizer.pt")
    return tmp_path / "optimizer.pt"


def read(path: Path, model: torch.nn.Module) -> Any:
    return read_adam_state(path, model, registry(model), accept_positional=True)


def refused(match: str, state: object, tmp_path: Path, model: torch.nn.Module) -> None:
    path = write(state, tmp_path)
    with pytest.raises(InputError, match=match) as caught:
        read(path, model)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1


def bnb_values(entry: dict[str, Any], number: int, blocksize: int = 256) -> torch.Tensor:
    """bitsandbytes' own reading of a moment."""
    values = entry[f"state{number}"]
    if values.dtype is not torch.uint8:
        return values
    quant = bnb.functional.QuantState(
        absmax=entry[f"absmax{number}"],
        code=entry[f"qmap{number}"],
        blocksize=blocksize,
        dtype=torch.float32,
    )
    return bnb.functional.dequantize_blockwise(values, quant)


def assert_bnb_values(adam: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, p in trainable(model).items():
        entry = optimizer.state[p]
        for number, moments in ((1, adam.exp_avg), (2, adam.exp_avg_sq)):
            assert moments[name].dtype is torch.float32
            assert moments[name].shape == p.shape
            # One product of the same two float32 numbers: equal to the last bit.
            assert torch.equal(moments[name], bnb_values(entry, number)), (name, number)
        assert adam.step[name] == entry["step"]
        assert type(adam.step[name]) is int


def next_step_error(run: SimpleNamespace, adam: Any, lr: float) -> float:
    """bitsandbytes' next step against ours: the largest error, relative to the terms that are added
    (old and new gradient may cancel), in units of float32's eps."""
    params = registry(run.model)
    backward(run.model)
    grads = {n: -p.grad for n, p in sorted(trainable(run.model).items())}
    v = update_direction(params, grads, adam)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    worst = 0.0
    for name, p in trainable(run.model).items():
        parts = [
            params[name],
            lr * v.momentum[name],
            lr * v.decay[name],
            lr * v.scale[name] * grads[name],
        ]
        parts = [part.double() for part in parts]
        error = (p.detach().double() - sum(parts)).abs()
        worst = max(worst, float((error / sum(part.abs() for part in parts)).max()) / EPS)
    return worst


ADAMS = {
    "AdamW8bit": (bnb.optim.AdamW8bit, {"weight_decay": 0.1}),
    "Adam8bit": (bnb.optim.Adam8bit, {"weight_decay": 0.1}),  # its decay is decoupled, too
    "PagedAdamW8bit": (bnb.optim.PagedAdamW8bit, {"betas": (0.8, 0.95), "eps": 1e-4}),
    "AdamW32bit": (bnb.optim.AdamW32bit, {"weight_decay": 0.1, "eps": 1e-4}),
}


# What is read


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("which", ADAMS)
def test_moments_and_next_step_are_bitsandbytes(which: str, layout: str, tmp_path: Path) -> None:
    make, options = ADAMS[which]
    run = stepped(make, **options)
    state = run.optimizer.state_dict()
    coded = sum(t["state1"].dtype is torch.uint8 for t in run.optimizer.state.values())
    assert coded == (0 if which == "AdamW32bit" else 8)  # of 12: both kinds are there
    assert NESTED in state["state"][0]
    adam, report = read(write(flat(state) if layout == "flat" else state, tmp_path), run.model)
    assert_bnb_values(adam, run.model, run.optimizer)
    note = f"moments of {coded} of 12 tensors are 8-bit, dequantised" if coded else "in 32 bits"
    assert any("bitsandbytes" in n and note in n for n in report.notes)
    group = run.optimizer.param_groups[0]
    assert adam.groups[0][1:] == (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    # About ten float32 operations, each off by half an eps at most; 2.2 was seen. At lr = 1 the step
    # is as large as the parameter.
    assert next_step_error(run, adam, lr=1.0) < 5


def test_the_next_step_would_show_a_wrong_moment(tmp_path: Path) -> None:
    run = stepped(bnb.optim.AdamW8bit)
    adam, _ = read(write(run.optimizer.state_dict(), tmp_path), run.model)
    name = next(n for n, t in adam.exp_avg.items() if t.numel() >= 4096)
    wrong = {**adam.exp_avg, name: adam.exp_avg[name] * (1 + 1e-4)}
    assert next_step_error(run, adam._replace(exp_avg=wrong), lr=1.0) > 50


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"])
def test_trainer_checkpoint(optim: str, tmp_path: Path) -> None:
    model = wide_model()
    live = trainer_run(model, tmp_path, optim=optim)
    adam, report = read(tmp_path / "checkpoint-2", wide_model(seed=1))
    assert_bnb_values(adam, model, live)
    assert set(adam.step.values()) == {2}
    assert report.format == "Hugging Face Trainer"
    assert adam.groups[0].weight_decay == 0.1
    assert any("8 of 12 tensors are 8-bit" in note for note in report.notes)


@pytest.mark.parametrize("which", ["AdamW8bit", "AdamW32bit"])
def test_live(which: str) -> None:
    run = stepped(ADAMS[which][0])
    adam, _ = live_adam_state(run.optimizer, run.model, registry(run.model))
    assert_bnb_values(adam, run.model, run.optimizer)
    kept = {name: t.clone() for name, t in adam.exp_avg.items()}
    run.optimizer.step()  # in place on the optimizer's tensors, none of which may be ours
    assert all(torch.equal(t, kept[name]) for name, t in adam.exp_avg.items())


def test_blocks_of_2048_as_before_0_44() -> None:
    """No such version runs here: the codes are bitsandbytes' of today, at the block size of then."""
    values = torch.randn(3, 1700, generator=torch.Generator().manual_seed(0))
    entry: dict[str, Any] = {"step": 5}
    for number, t in ((1, values), (2, values.square())):
        code = bnb.functional.create_dynamic_map(signed=number == 1)
        codes, quant = bnb.functional.quantize_blockwise(t, code=code, blocksize=2048)
        entry |= {f"state{number}": codes, f"qmap{number}": code, f"absmax{number}": quant.absmax}
    assert len(entry["absmax1"]) == 3
    group = {"params": [0], "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    found = dequantised(saved({"state": {0: entry}, "param_groups": [group]}))
    require_adam(found)
    assert torch.equal(found.state[0]["exp_avg"], bnb_values(entry, 1, 2048))
    assert torch.equal(found.state[0]["exp_avg_sq"], bnb_values(entry, 2, 2048))
    assert (found.state[0]["exp_avg"] - values).abs().max() < 0.1 * values.abs().max()


def test_other_states_pass_unchanged() -> None:
    run = stepped(torch.optim.AdamW)
    before = saved(run.optimizer.state_dict())
    assert dequantised(before) is before


def test_the_argument_is_not_changed() -> None:
    state = stepped(bnb.optim.AdamW8bit, steps=1).optimizer.state_dict()
    before = saved(state)
    kept = copy.deepcopy(before)
    dequantised(before)
    assert before.groups == kept.groups
    assert list(before.state[0]) == list(kept.state[0])
    assert "amsgrad" not in before.groups[0]


# What is refused


OTHERS = {
    "Lion8bit": (bnb.optim.Lion8bit, {}, "Lion, SGD, RMSprop or Adagrad"),
    "SGD8bit": (bnb.optim.SGD8bit, {"momentum": 0.9}, "Lion, SGD, RMSprop or Adagrad"),
    "RMSprop8bit": (bnb.optim.RMSprop8bit, {}, "Lion, SGD, RMSprop or Adagrad"),
    "Adagrad8bit": (bnb.optim.Adagrad8bit, {}, "Lion, SGD, RMSprop or Adagrad"),
    "LARS8bit": (bnb.optim.LARS8bit, {"momentum": 0.9}, "LARS"),
    "LAMB8bit": (bnb.optim.LAMB8bit, {}, "LAMB"),
    "LAMB32bit": (bnb.optim.LAMB32bit, {}, "LAMB"),
    "AdEMAMix8bit": (bnb.optim.AdEMAMix8bit, {}, "AdEMAMix"),
    "PagedAdEMAMix": (bnb.optim.PagedAdEMAMix, {}, "AdEMAMix"),
    "AdEMAMix, two betas": (bnb.optim.AdEMAMix8bit, {"betas": (0.9, 0.999)}, "AdEMAMix"),
    "AdEMAMix, no alpha": (bnb.optim.AdEMAMix, {"alpha": 0.0}, "AdEMAMix"),
}


@pytest.mark.parametrize("which", OTHERS)
def test_other_optimizers_of_bitsandbytes(which: str, tmp_path: Path) -> None:
    make, options, match = OTHERS[which]
    run = stepped(make, steps=1, **options)
    match = f"state of bitsandbytes' {match}.*expected AdamW's state"
    refused(match, run.optimizer.state_dict(), tmp_path, run.model)
    refused(match, flat(run.optimizer.state_dict()), tmp_path, run.model)


@pytest.fixture(scope="module")
def adamw() -> SimpleNamespace:
    return stepped(bnb.optim.AdamW8bit)


@pytest.fixture
def state(adamw: SimpleNamespace) -> dict[str, Any]:
    return flat(copy.deepcopy(adamw.optimizer.state_dict()))


def at(state: dict[str, Any], coded: bool = True) -> dict[str, Any]:
    """The first entry that is 8-bit, or is not."""
    return next(e for e in state["state"].values() if ("absmax1" in e) == coded)


def test_percentile_clipping_and_whole_tensor_scales(adamw, state, tmp_path: Path) -> None:
    """Options of versions before 0.47, which kept these tensors; built from their layout."""
    at(state)["gnorm_vec"] = torch.zeros(100)
    refused("bitsandbytes' percentile_clipping", state, tmp_path, adamw.model)
    del at(state)["gnorm_vec"]
    entry = at(state)
    del entry["absmax1"], entry["absmax2"]
    entry |= {k: torch.ones(1) for k in ("max1", "new_max1", "max2", "new_max2")}
    refused("bitsandbytes' block_wise = False", state, tmp_path, adamw.model)


def test_unknown_and_mixed_states(adamw, state, tmp_path: Path) -> None:
    at(state)["state3"] = torch.zeros(3)
    refused("unknown optimizer with state3", state, tmp_path, adamw.model)
    del at(state)["state3"]
    last = max(state["state"])
    moment = torch.zeros(trainable(adamw.model).popitem()[1].shape)
    state["state"][last] = {"step": 3, "exp_avg": moment, "exp_avg_sq": moment}
    refused("unknown optimizer with exp_avg, exp_avg_sq", state, tmp_path, adamw.model)


@pytest.mark.parametrize("key", ["qmap1", "absmax1", "qmap2", "absmax2"])
def test_damaged_tables(key: str, adamw, state, tmp_path: Path) -> None:
    entry = at(state)
    table = entry.pop(key)
    position = next(k for k, e in state["state"].items() if e is entry)
    place = f"state{key[-1]} of position {position} "
    refused(f"{place}is 8-bit, without its {key}", state, tmp_path, adamw.model)
    entry[key] = table.double()
    refused(f"{place}is 8-bit, without its {key}", state, tmp_path, adamw.model)
    entry[key] = table[:-1]
    refused(f"{place}has 4800 codes, .* expected 256 and 19, 3", state, tmp_path, adamw.model)
    state["param_groups"][0]["param_names"] = list(trainable(adamw.model))
    name = list(trainable(adamw.model))[position]
    refused(f"state{key[-1]} of {name} has 4800 codes", state, tmp_path, adamw.model)


def test_codes_that_are_no_codes(adamw, state, tmp_path: Path) -> None:
    entry = at(state)
    codes = entry["state1"]
    entry["state1"] = codes.to(torch.int16)
    refused("neither uint8 nor float32", state, tmp_path, adamw.model)
    entry["state1"] = codes.T.contiguous().T
    refused("not contiguous", state, tmp_path, adamw.model)
    entry[NESTED] = {"state1": codes}
    refused("not as bitsandbytes writes it", state, tmp_path, adamw.model)


def test_missing_moments_are_missing(adamw, state, tmp_path: Path) -> None:
    for entry in list(state["state"].values())[:3]:
        del entry["state2"]
    names = list(trainable(adamw.model))
    refused(f"exp_avg_sq 9, exp_avg 12.*missing: .*{names[0]}", state, tmp_path, adamw.model)


def test_shuffled_and_truncated(adamw, state, tmp_path: Path) -> None:
    entries = state["state"]
    shuffled = dict(zip(entries, [entries[k] for k in sorted(entries, reverse=True)], strict=True))
    refused(
        f"exp_avg of {sorted(trainable(adamw.model))[0]} has shape",
        {**state, "state": shuffled},
        tmp_path,
        adamw.model,
    )
    path = write(state, tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"torch checkpoint|truncated"):
        read(path, adamw.model)
