"""The reference policy: TRL's own, by its own switch, to the bit and without a second model."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import use_adapter

import funcprobe
from funcprobe.adapters.checkpoint import reference
from funcprobe.adapters.checkpoint.model import Policy, load_policy
from funcprobe.adapters.checkpoint.reference import initial_adapter, reference_params
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.trainers.live import live_policy
from funcprobe.policy.forward import frozen_forward
from funcprobe.policy.layout import microbatches
from funcprobe.policy.precision import arithmetic_of
from funcprobe.types import InputError, Params
from support.architectures import ADAPTERS, BATCH, CPU, TIED, lora_config, save_adapter, save_base
from support.checkpoints import edit_json
from support.every_architecture import small_config

TEMPERATURE = 0.7
KINDS = [
    (adapter, tied) for adapter in ADAPTERS for tied in ((False, True) if adapter in TIED else (False,))
]
NAMES = [f"{adapter}{'-tied' * tied}" for adapter, tied in KINDS]
# TRL 1.16 rejects LoRA on the output embedding, peft 0.21 a second adapter where biases are trained.
COPIED = [k for k in KINDS if k[0] not in {"lora-head", "trained-biases", "biases-of-lora"}]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made: dict[tuple[str, bool], Path] = {}

    def folder(tied: bool = False, architecture: str = "qwen2") -> Path:
        if (architecture, tied) not in made:
            place = tmp_path_factory.mktemp("base")
            made[architecture, tied] = save_base(architecture, place, tied=tied)
        return made[architecture, tied]

    return folder


def plain(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def load(folder: Path, **changes) -> Policy:
    return load_policy(PolicyConfig.model_validate({"checkpoint": str(folder), **changes}), CPU)


def logits_at(policy: Policy, params: Params) -> torch.Tensor:
    """[N, L, V] of the policy's bound forward at other values of its registry, at every position.

    So the products have the shapes that they have in the model's own forward, and round alike.
    """
    (rows,) = microbatches(BATCH, 64)
    count, length = rows.tokens_NL.shape
    everywhere = rows._replace(
        row_T=torch.arange(count).repeat_interleave(length),
        position_T=torch.arange(length).repeat(count),
    )
    forward = frozen_forward(policy.model, policy.params)
    with torch.no_grad():
        return forward.logits(params, forward.hidden(params, everywhere)).view(count, length, -1)


class Theirs(NamedTuple):
    """peft's model in TRL's context of the reference, as logits [N, L, V] of tokens [N, L]."""

    model: PeftModel
    adapter: str | None

    def __call__(self, tokens_NL: torch.Tensor) -> torch.Tensor:
        params = {n: p for n, p in self.model.named_parameters() if p.is_floating_point()}
        with torch.no_grad(), use_adapter(self.model, self.adapter), arithmetic_of(params):
            return self.model(input_ids=tokens_NL).logits


def logp_of(logits_NLV: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, R] of the response tokens, as TRL computes them; 0 past their end."""
    logp_NLV = (logits_NLV / TEMPERATURE).double().log_softmax(-1)
    found_NR = torch.zeros(funcprobe.response_mask(BATCH).shape, dtype=torch.float64)
    for n, (start, length) in enumerate(
        zip(BATCH.prompt_length_N.tolist(), BATCH.response_length_N.tolist(), strict=True)
    ):
        for k in range(length):
            token = BATCH.tokens_NL[n, start + k]
            found_NR[n, k] = logp_NLV[n, start + k - 1, token]
    return found_NR


def require_reference(policy: Policy, theirs: Theirs) -> Params:
    """The reference is theirs to the bit, is not the policy, and the policy stays as it is."""
    before = {n: (p, p.detach().clone(), p.requires_grad) for n, p in policy.model.named_parameters()}
    at = reference_params(policy)
    assert list(at) == list(policy.params)
    assert all(at[n].dtype == t.dtype and not at[n].requires_grad for n, t in policy.params.items())
    (rows,) = microbatches(BATCH, 64)
    theirs_NLV = theirs(rows.tokens_NL)
    # The same products on the same shapes, to which exact zeros are added.
    ours_NLV = logits_at(policy, at)
    assert ours_NLV.dtype == theirs_NLV.dtype
    assert torch.equal(ours_NLV, theirs_NLV)
    assert float((logits_at(policy, policy.params) - theirs_NLV).abs().max()) > 0.05
    forward = frozen_forward(policy.model, policy.params, TEMPERATURE)
    stats = funcprobe.token_stats(at, BATCH, forward)
    # The head's products have fewer rows: some dozen roundings of logits of size 10, over TEMPERATURE.
    atol = 200 * torch.finfo(theirs_NLV.dtype).eps
    torch.testing.assert_close(stats.logp_NR, logp_of(theirs(BATCH.tokens_NL)), rtol=0, atol=atol)
    after = dict(policy.model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value, trained) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, value)
        assert parameter.requires_grad is trained
    assert policy.model.active_adapter == "default"
    return at


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("adapter", "tied"), KINDS, ids=NAMES)
def test_a_new_adapter_has_the_base_as_its_reference(bases, tmp_path, adapter, tied, dtype):
    base = bases(tied)
    save_adapter(plain(base), lora_config("qwen2", adapter), base, tmp_path)
    policy = load(tmp_path, dtype=dtype)
    assert initial_adapter(policy) is None
    theirs = PeftModel.from_pretrained(plain(base, dtype=getattr(torch, dtype)), tmp_path).eval()
    require_reference(
        policy, Theirs(theirs.to(getattr(torch, dtype)) if dtype == "float64" else theirs, None)
    )
