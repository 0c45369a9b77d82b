"""policy.device_map: layers where transformers and accelerate place them."""

from types import SimpleNamespace

import pytest
import torch

from funcprobe.adapters.checkpoint.device_map import placement, require_in_place
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.machine.devices import where
from funcprobe.types import InputError

CPU = torch.device("cpu")
AUTO = PolicyConfig(device_map="auto")


def load(checkpoint, **changes):
    return load_policy(
        PolicyConfig.model_validate({"checkpoint": str(checkpoint.adapter), **changes}), CPU
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="layers go to the GPU")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("device_map", ["auto", {"model": "cpu", "lm_head": "cpu"}, {"": "cpu"}])
def test_without_a_gpu_it_is_the_policy_on_the_cpu(checkpoint, dtype, device_map) -> None:
    placed, plain = load(checkpoint, device_map=device_map, dtype=dtype), load(checkpoint, dtype=dtype)
    assert placed.lines == plain.lines
    assert placed.params.keys() == plain.params.keys()
    tokens = torch.tensor([[5, 12, 6]])
    with torch.no_grad():
        assert torch.equal(placed.model(tokens).logits, plain.model(tokens).logits)


def refusal(checkpoint, **changes) -> str:
    with pytest.raises(InputError) as caught:
        load(checkpoint, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_part_without_a_place_is_named(checkpoint) -> None:
    message = refusal(checkpoint, device_map={"model.embed_tokens": "cpu", "elsewhere": "cpu"})
    assert message.startswith("policy.device_map has elsewhere, which base")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_a_gpu_that_is_not_there_is_named(checkpoint) -> None:
    message = refusal(checkpoint, device_map={"model": 0, "lm_head": "cuda:1"})
    assert message.startswith('policy.device_map = "cuda:0", but torch finds 0 CUDA devices')
    assert 'policy.device_map = "disk": expected' in refusal(checkpoint, device_map={"": "disk"})


def test_of_cpu_and_gpu_together_accelerate_would_copy_weights(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    both = PolicyConfig(device_map={"model": 0, "lm_head": "cpu"})
    with pytest.raises(
        InputError, match=r"on the CPU and on GPUs, where accelerate copies .*: give it"
    ):
        placement(both, CPU)
    gpus = PolicyConfig(device_map={"model": 0, "lm_head": "cuda:1"})
    assert placement(gpus, CPU) == {"device_map": {"model": "cuda:0", "lm_head": "cuda:1"}}


@pytest.mark.parametrize("away", ["cpu", "disk"])
def test_layers_that_did_not_fit_are_named(away) -> None:
    base = SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": away})
    with pytest.raises(
        InputError, match=rf"1 of its 2 parts, as model\.layers\.1, .* on the {away}: give"
    ):
        require_in_place(base, "large", AUTO)
    require_in_place(SimpleNamespace(hf_device_map={"model": 0, "lm_head": 1}), "large", AUTO)
    require_in_place(SimpleNamespace(hf_device_map={"": "cpu"}), "large", AUTO)
    require_in_place(SimpleNamespace(), "large", AUTO)


def test_a_4_bit_base_is_quantised_where_it_stays() -> None:
    given = PolicyConfig(mode="qlora"), torch.device("cuda", 1)
    assert placement(*given) == {"device_map": {"": "cuda:1"}}
    assert placement(PolicyConfig(mode="qlora", device_map="auto"), CPU) == {"device_map": "auto"}


def test_a_device_for_the_run_and_a_map_are_one_too_many(tmp_path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[policy]\ndevice_map = {model = 0, lm_head = "cuda:1"}\n', encoding="utf-8")
    assert read_config(file, []).policy.device_map == {"model": 0, "lm_head": "cuda:1"}
    with pytest.raises(
        InputError, match=r'run\.device = "cuda", but policy\.device_map places'
    ) as caught:
        read_config(file, ["run.device=cuda"])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"policy\.device_map"):
        read_config(file, ["policy.device_map=fast"])


def test_where_a_model_is() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, device="meta"))
    assert where(model) == "cpu, meta"
