"""The reference policy: TRL's own, by its own switch, to the bit and without a second model."""

import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import use_adapter

import funcprobe
from funcprobe.adapters.checkpoint import reference
from funcprobe.adapters.checkpoint.model import Policy, load_policy
from funcprobe.adapters.checkpoint.reference import initial_adapter, reference_params
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.trainers.live import at_rest, live_policy
from funcprobe.policy.forward import frozen_forward
from funcprobe.policy.layout import microbatches
from funcprobe.policy.precision import arithmetic_of
from funcprobe.policy.reference import adapter_params
from funcprobe.types import InputError, Params
from support.architectures import ADAPTERS, BATCH, CPU, TIED, lora_config, save_adapter, save_base
from support.checkpoints import character_tokenizer, edit_json
from support.every_architecture import small_config
from support.slow import first

TEMPERATURE = 0.7
KINDS = [
    (adapter, tied) for adapter in ADAPTERS for tied in ((False, True) if adapter in TIED else (False,))
]
NAMES = [f"{adapter}{'-tied' * tied}" for adapter, tied in KINDS]
# TRL 1.16 rejects LoRA on the output embedding, peft 0.21 a second adapter where biases are trained.
COPIED = [k for k in KINDS if k[0] not in {"lora-head", "trained-biases", "biases-of-lora"}]
COPIED_NAMES = [NAMES[KINDS.index(kind)] for kind in COPIED]


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
    # In bfloat16 that is of the size of the numbers, so that the equality above has to do.
    if (eps := torch.finfo(theirs_NLV.dtype).eps) < 1e-6:
        expected_NR = logp_of(theirs(BATCH.tokens_NL))
        torch.testing.assert_close(stats.logp_NR, expected_NR, rtol=0, atol=200 * eps)
    after = dict(policy.model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value, trained) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, value)
        assert parameter.requires_grad is trained
    assert policy.model.active_adapter == "default"
    return at


SLOW = partial(pytest.param, marks=pytest.mark.slow)  # together half a minute


@pytest.mark.parametrize("dtype", ["float32", *map(SLOW, ["float64", "bfloat16"])])
@pytest.mark.parametrize(("adapter", "tied"), first(9, KINDS), ids=NAMES)
def test_a_new_adapter_has_the_base_as_its_reference(bases, tmp_path, adapter, tied, dtype):
    base = bases(tied)
    save_adapter(plain(base), lora_config("qwen2", adapter), base, tmp_path)
    policy = load(tmp_path, dtype=dtype)
    assert initial_adapter(policy) is None
    theirs = PeftModel.from_pretrained(plain(base, dtype=getattr(torch, dtype)), tmp_path).eval()
    require_reference(
        policy, Theirs(theirs.to(getattr(torch, dtype)) if dtype == "float64" else theirs, None)
    )


def grpo_trainer(folder: Path, model, base: Path, config=None, **settings) -> GRPOTrainer:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "beta": 0.1,
        "temperature": TEMPERATURE,
        "max_steps": 2,
        "save_steps": 2,
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 5,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
    } | settings
    return GRPOTrainer(
        model=model,
        reward_funcs=[lambda completions, **_: [sum(map(ord, text)) % 7 / 7 for text in completions]],
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": f"{a}+{9 - a}="} for a in range(8)]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=config,
    )


def retrained(folder: Path, base: Path, config: LoraConfig) -> PeftModel:
    """What TRL makes of a trained adapter that it is given, moved on and saved in `folder`/more."""
    save_adapter(plain(base), config, base, folder / "first")
    model = PeftModel.from_pretrained(plain(base), folder / "first", is_trainable=True)
    grpo_trainer(folder / "run", model, base)
    torch.manual_seed(4)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder / "more")
    return model


def of_file(folder: Path, base: Path, **options) -> Theirs:
    """Both adapters, by peft's own loader."""
    model = PeftModel.from_pretrained(plain(base, **options), folder)
    model.load_adapter(folder / "ref", "ref")
    return Theirs(model.eval(), "ref")


@pytest.mark.parametrize("dtype", [SLOW("float32"), "float64"])
@pytest.mark.parametrize(("adapter", "tied"), first(6, COPIED), ids=COPIED_NAMES)
def test_an_adapter_that_is_trained_on_has_its_copy_as_its_reference(
    bases, tmp_path, adapter, tied, dtype
):
    base = bases(tied)
    live = retrained(tmp_path, base, lora_config("qwen2", adapter))
    policy = load(tmp_path / "more", dtype=dtype)
    assert initial_adapter(policy) == (str(tmp_path / "more" / "ref"), None)
    theirs = of_file(tmp_path / "more", base, dtype=getattr(torch, dtype))
    at = require_reference(policy, theirs._replace(model=theirs.model.to(getattr(torch, dtype))))
    # The base is another policy.
    base_NLV = theirs._replace(adapter=None)(BATCH.tokens_NL)
    assert float((theirs(BATCH.tokens_NL) - base_NLV).abs().max()) > 0.05
    # In the trainer's memory, the same.
    if dtype == "float32":
        params = funcprobe.trainable_params(live)
        inside = Policy(live, None, params, (1,), 0, str(base), None, "sdpa", ())
        with at_rest(live):
            found = require_reference(inside, Theirs(live, "ref"))
        assert all(torch.equal(found[n], t) for n, t in at.items())


class Scored(NamedTuple):
    """A training by TRL with a KL term, and the reference log-probabilities of its last rollouts."""

    trainer: GRPOTrainer
    checkpoint: Path
    batch: funcprobe.Batch
    ref_logp_NR: torch.Tensor


def trained(folder: Path, model, base: Path, config: LoraConfig | None) -> Scored:
    trainer = grpo_trainer(folder, model, base, config, gradient_checkpointing=True)
    scored, own = [], trainer._generate_and_score_completions

    def kept(inputs):
        scored.append(own(inputs))
        return scored[-1]

    trainer._generate_and_score_completions = kept
    trainer.train()
    last = scored[-1]
    rows = [
        [
            ids[mask.bool()].tolist()
            for ids, mask in zip(last[f"{part}_ids"], last[f"{part}_mask"], strict=True)
        ]
        for part in ("prompt", "completion")
    ]
    batch = funcprobe.collate(*rows, range(len(rows[0])))
    mask_NR = last["completion_mask"][:, : funcprobe.response_mask(batch).shape[1]]
    ref_logp_NR = last["ref_per_token_logps"].double()[:, : mask_NR.shape[1]] * mask_NR
    return Scored(trainer, folder / "checkpoint-2", batch, ref_logp_NR)


@pytest.mark.parametrize("begun", ["new", "existing"])
def test_the_reference_is_what_trl_logged_in_its_rollouts(bases, tmp_path, begun):
    """TRL's ref_per_token_logps of the step, from its memory and from its checkpoint."""
    base, config = bases(), lora_config("qwen2", "all-linear")
    model = plain(base)
    if begun == "existing":
        save_adapter(plain(base), config, base, tmp_path / "first")
        model = PeftModel.from_pretrained(model, tmp_path / "first", is_trainable=True)
    found = trained(tmp_path / "run", model, base, config if begun == "new" else None)
    inside = live_policy(found.trainer, 10**6)
    for policy in (inside, load(found.checkpoint)):
        with at_rest(policy.model):
            at = reference_params(policy)
            forward = frozen_forward(policy.model, policy.params, TEMPERATURE)
            stats = funcprobe.token_stats(at, found.batch, forward)
            own = funcprobe.token_stats(policy.params, found.batch, forward)
        # As above: other shapes of the same products, in float32.
        torch.testing.assert_close(stats.logp_NR, found.ref_logp_NR, rtol=0, atol=3e-5)
        assert float((own.logp_NR - found.ref_logp_NR).abs().max()) > 0.05
    assert all(torch.equal(t, at[n]) for n, t in reference_params(inside).items() if "lora_B" in n)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """A mixture of experts, whose fused weights are parameters without a layer of their own."""
    folder = tmp_path_factory.mktemp("experts")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(small_config("mixtral")).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def of_experts() -> LoraConfig:
    fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    given = {"r": 2, "lora_alpha": 5, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    return LoraConfig(**given, target_parameters=fused)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("begun", ["new", "existing"])
def test_an_adapter_on_the_parameters_of_experts(experts, tmp_path, begun, dtype):
    options = {"dtype": getattr(torch, dtype)}
    options |= {"experts_implementation": "eager"} if dtype == "float64" else {}
    if begun == "existing":
        retrained(tmp_path, experts, of_experts())
        theirs = of_file(tmp_path / "more", experts, **options)
    else:
        save_adapter(plain(experts), of_experts(), experts, tmp_path / "more")
        model = PeftModel.from_pretrained(plain(experts, **options), tmp_path / "more")
        theirs = Theirs(model.eval(), None)
    policy = load(tmp_path / "more", dtype=dtype)
    assert any(".experts." in name for name in policy.params)
    require_reference(policy, theirs._replace(model=theirs.model.to(getattr(torch, dtype))))


@pytest.mark.parametrize("dtype", ["float32", SLOW("float64")])
@pytest.mark.parametrize("adapter", ["all-linear", "trained-head", "lora-embedding", "lora-bias"])
def test_a_base_in_4_bits(bases, tmp_path, adapter, dtype):
    """peft's switch on the same 4-bit layers, which have tests of their own."""
    base = bases()
    save_adapter(plain(base), lora_config("qwen2", adapter), base, tmp_path)
    policy, again = (load(tmp_path, mode="qlora", dtype=dtype) for _ in range(2))
    require_reference(policy, Theirs(again.model, None))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_an_initialisation_took_from_the_base_stays_out(bases, tmp_path, init):
    """TRL's reference is then the rest of the base, not the base as it was."""
    base = bases()
    save_adapter(
        plain(base), lora_config("qwen2", "all-linear", init_lora_weights=init), base, tmp_path
    )
    theirs = PeftModel.from_pretrained(plain(base), tmp_path).eval()
    require_reference(load(tmp_path), Theirs(theirs, None))


def test_the_reference_of_the_initial_adapter_is_the_base(bases, tmp_path):
    """ref/ probed as the policy has no copy beside it."""
    base = bases()
    retrained(tmp_path, base, lora_config("qwen2", "all-linear"))
    policy = load(tmp_path / "more", adapter="ref")
    assert initial_adapter(policy) is None
    at = reference_params(policy)
    assert all(bool(t.any()) != ("lora_B" in n) for n, t in at.items())


def test_a_model_trained_as_a_whole_has_none(bases):
    policy = load(bases())
    with pytest.raises(InputError, match=r"the whole model was trained.*column ref_logp") as refused:
        reference_params(policy)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def copied(bases, tmp_path_factory) -> Path:
    """A checkpoint with ref/ and a vocabulary that was resized, with embeddings in both files."""
    base, folder = bases(), tmp_path_factory.mktemp("copied")
    model = plain(base)
    model.resize_token_embeddings(20, mean_resizing=False)
    save_adapter(model, lora_config("qwen2", "trained-head"), base, folder / "first")
    model = plain(base)
    model.resize_token_embeddings(20, mean_resizing=False)
    model = PeftModel.from_pretrained(model, folder / "first", is_trainable=True)
    grpo_trainer(folder / "run", model, base)
    for p in model.parameters():
        p.data += 0.2 * p.requires_grad
    model.save_pretrained(folder / "more")
    return folder / "more"


def test_a_resized_vocabulary(copied):
    policy = load(copied)
    at = reference_params(policy)
    first = load_file(copied.parent / "first" / "adapter_model.safetensors")
    head = "base_model.model.lm_head.modules_to_save.default.weight"
    assert torch.equal(at[head], first["base_model.model.lm_head.weight"])
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
    assert torch.equal(at[f"{name}.default.weight"], first[f"{name}.weight"])
    assert not torch.equal(at[head], policy.params[head])


Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"


def edited(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def filled(name: str, value: float):
    def change(tensors) -> None:
        tensors[name][0] = value

    return change


FILES = {
    "renamed": (
        lambda t: t.update({"x": t.pop(Q_PROJ)}),
        "2 tensors are not those of the policy's, as",
    ),
    "narrower": (
        lambda t: t.update({Q_PROJ: t[Q_PROJ][:, 1:].contiguous()}),
        r"q_proj.lora_A.weight has shape \(2, 31\).*\(2, 32\), is expected",
    ),
    "infinite": (filled(Q_PROJ, float("inf")), "q_proj.lora_A.weight contains a non-finite number"),
    "another-base": (filled(EMBEDDING, 1.0), "embed_tokens.weight is frozen, and differs"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_a_copy_of_the_policys_is_rejected(copied, tmp_path, case):
    change, says = FILES[case]
    shutil.copytree(copied, tmp_path / "copy")
    policy = load(tmp_path / "copy")
    reference_params(policy)
    edited(tmp_path / "copy" / "ref" / "adapter_model.safetensors", change)
    with pytest.raises(InputError, match=f"the adapter in .*ref: .*{says}") as refused:
        reference_params(policy)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_alpha": 7}, "has lora_alpha = 7, that of the policy's own adapter, 5, is expected"),
        ({"use_rslora": True}, "has use_rslora = True"),
        ({"target_modules": ["v_proj"]}, "has target_modules = {'v_proj'}"),
        ({"use_dora": True}, "DoRA is not supported"),
    ],
)
def test_other_settings_are_rejected(copied, tmp_path, changes, says):
    shutil.copytree(copied, tmp_path / "copy")
    edit_json(tmp_path / "copy" / "ref" / "adapter_config.json", **changes)
    policy = load(tmp_path / "copy")
    with pytest.raises(InputError, match=says) as refused:
        reference_params(policy)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("gone", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_a_copy_is_rejected(copied, tmp_path, gone):
    shutil.copytree(copied, tmp_path / "copy")
    (tmp_path / "copy" / "ref" / gone).unlink()
    policy = load(tmp_path / "copy")
    with pytest.raises(InputError, match=rf"ref has neither .*{gone}"):
        reference_params(policy)


def test_a_copy_that_was_taken_from_the_base_a_second_time_is_rejected(bases, tmp_path):
    """Adding it changes the policy that TRL trains: neither is what the files give."""
    base = bases()
    config = lora_config("qwen2", "all-linear", init_lora_weights="pissa")
    save_adapter(plain(base), config, base, tmp_path / "first")
    model = PeftModel.from_pretrained(plain(base), tmp_path / "first", is_trainable=True)
    before = Theirs(model.eval(), "default")(BATCH.tokens_NL)
    grpo_trainer(tmp_path / "run", model, base)
    assert float((Theirs(model.eval(), "default")(BATCH.tokens_NL) - before).abs().max()) > 0.1
    model.save_pretrained(tmp_path / "more")
    inside = Policy(model, None, funcprobe.trainable_params(model), (1,), 0, "", None, "sdpa", ())
    for policy in (load(tmp_path / "more"), inside):
        with pytest.raises(InputError, match=r'init_lora_weights = "pissa": adding it took'):
            reference_params(policy)


def test_another_adapter_in_memory_is_rejected(bases):
    model = get_peft_model(plain(bases()), lora_config("qwen2", "all-linear"))
    model.add_adapter("ref", LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    params = funcprobe.trainable_params(model)
    policy = Policy(model, None, params, (1,), 0, "", None, "sdpa", ())
    with pytest.raises(InputError, match=r'the adapter "ref" of the model has'):
        reference_params(policy)
    with pytest.raises(InputError, match=r"adapter ref has no .*: both adapters must"):
        adapter_params(model, params, "ref")


def test_a_hub_id_is_asked_for_its_copy(bases, tmp_path, monkeypatch):
    base = bases()
    save_adapter(plain(base), lora_config("qwen2", "all-linear"), base, tmp_path)
    policy = load(tmp_path)._replace(source="acme/adapter")

    def answer(error: Exception | None):
        def download(source: str, file: str, *, subfolder: str) -> str:
            assert (source, file, subfolder) == ("acme/adapter", "adapter_config.json", "ref")
            if error:
                raise error
            return ""

        monkeypatch.setattr(reference, "hf_hub_download", download)
        return initial_adapter(policy)

    assert answer(None) == ("acme/adapter", "ref")
    assert answer(RemoteEntryNotFoundError("404", response=Mock(headers={}))) is None
    with pytest.raises(InputError, match=r"acme/adapter: without a connection it is not known"):
        answer(LocalEntryNotFoundError("offline"))
