"""Every architecture with every kind of adapter: peft's logits to the bit, and their derivatives."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch.func import jvp
from transformers import AutoModelForCausalLM

import funcprobe
from funcprobe import UpdateBatch
from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.policy.forward import frozen_forward
from funcprobe.policy.layout import microbatches
from funcprobe.policy.precision import arithmetic_of
from funcprobe.types import InputError
from support.architectures import (
    ARCHITECTURES,
    BATCH,
    CASES,
    CPU,
    P_NR,
    case_id,
    central_difference,
    lora_config,
    same_shapes_logits,
    save_adapter,
    save_base,
    three_routes,
)
from support.checkpoints import edit_json
from support.policies import random_like

pytestmark = pytest.mark.no_cover  # of other models, what others of this folder cover

# Each architecture and each adapter, in the default suite; the whole table with -m slow.
FIRST = [c for c in CASES if c[0] == "llama" or c[1] == "all-linear"]
TABLE = [pytest.param(c, marks=() if c in FIRST else pytest.mark.slow, id=case_id(c)) for c in CASES]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of bases, made once."""
    made = {}

    def folder(architecture, tied=False):
        key = (architecture, tied)
        if key not in made:
            made[key] = save_base(architecture, tmp_path_factory.mktemp("base"), tied=tied)
        return made[key]

    return folder


def plain(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def load(folder, **changes):
    return load_policy(PolicyConfig.model_validate({"checkpoint": str(folder), **changes}), CPU)


@pytest.mark.parametrize("case", TABLE)
def test_logits_are_pefts_to_the_bit(bases, tmp_path, case):
    architecture, adapter, tied = case
    base = bases(architecture, tied)
    trained = save_adapter(plain(base), lora_config(architecture, adapter), base, tmp_path)
    policy = load(tmp_path)
    expected = {n: p for n, p in trained.named_parameters() if p.requires_grad}
    assert list(policy.params) == sorted(expected)
    assert all(torch.equal(t, expected[n]) for n, t in policy.params.items())
    # The same products on the same shapes: no rounding between them.
    reference = PeftModel.from_pretrained(plain(base), tmp_path).eval()
    ours_NLV, theirs_NLV = same_shapes_logits(policy.model, reference)
    assert torch.equal(ours_NLV, theirs_NLV)
    (rows,) = microbatches(BATCH, 64)
    with torch.no_grad(), reference.disable_adapter():
        without_NLV = reference(input_ids=rows.tokens_NL).logits
    assert float((ours_NLV - without_NLV).abs().max()) > 0.05
    # What the primitives read is these logits at the response positions. The head's products have
    # fewer rows there: two dozen roundings of numbers of size 1 to 10.
    forward = frozen_forward(policy.model, policy.params)
    stats = funcprobe.token_stats(policy.params, BATCH, forward)
    logp_TV = theirs_NLV[rows.row_T, rows.position_T].log_softmax(-1)
    target_T = logp_TV.gather(-1, rows.target_T[:, None])[:, 0]
    logp_T = stats.logp_NR[rows.sequence_T, rows.k_T].float()
    torch.testing.assert_close(logp_T, target_T, rtol=1e-5, atol=1e-5)
    assert torch.equal(funcprobe.seq_logprobs(policy.params, BATCH, forward), stats.logp_NR.sum(1))


# Some hundred roundings on the way, and curvature that magnifies them.
TOLERANCES = {"float32": 1e-4, "float64": 1e-12}


def is_first(case, dtype) -> bool:
    """In float32 each architecture: no kind of adapter rounds otherwise than another."""
    return case in FIRST and (dtype == "float64" or case[1] == "all-linear")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            *(c, dtype),
            marks=() if is_first(c, dtype) else pytest.mark.slow,
            id=f"{case_id(c)}-{dtype}",
        )
        for c in CASES
        for dtype in TOLERANCES
    ],
)
def test_derivatives(bases, tmp_path, case, dtype):
    architecture, adapter, tied = case
    base = bases(architecture, tied)
    save_adapter(plain(base), lora_config(architecture, adapter), base, tmp_path)
    probe = funcprobe.bind(load(tmp_path, dtype=dtype).model, max_tokens=64)
    v = random_like(probe.params)
    routes = three_routes(probe, v)
    routes.require_equal(TOLERANCES[dtype])
    if dtype == "float32":
        return
    # eta^2 times a third derivative some thousand times the first; rounding 1e-15 / eta.
    measured = central_difference(probe, v, 1e-6)
    assert measured == pytest.approx(routes.forward, abs=1e-6 * routes.size)
    # grad_X and grad_Y against the estimator's derivative and the log-probabilities' tangents.
    stats, tangent = probe.tangents(probe.params, BATCH, v)
    at = funcprobe.evaluate(BATCH, stats)
    along = funcprobe.derivative(at, tangent, BATCH.prompt_N).derivative
    X = probe.grad_X(probe.params, BATCH)
    assert funcprobe.tree.dot(X, v) == pytest.approx(along, rel=1e-9)
    Y = probe.grad_Y(probe.params, UpdateBatch(BATCH, P_NR))
    assert funcprobe.tree.dot(Y, v) == pytest.approx(float((P_NR * tangent.logp_NR).sum()), rel=1e-9)


@pytest.mark.parametrize(
    "architecture",
    [
        # torch 2.13, pytorch #196700: layer_norm's nested forward mode is wrong without an error.
        pytest.param(a, marks=pytest.mark.xfail(strict=True) if a == "gpt2" else ())
        for a in ARCHITECTURES
    ],
)
def test_jvp_of_jvp(bases, tmp_path, architecture):
    base = bases(architecture)
    save_adapter(plain(base), lora_config(architecture, "all-linear"), base, tmp_path)
    probe = funcprobe.bind(load(tmp_path, dtype="float64", attention="eager").model, max_tokens=64)
    v, params, eta = random_like(probe.params), probe.params, 2e-6

    def f(given):
        stats = funcprobe.token_stats(given, BATCH, probe.forward)
        return (P_NR * stats.logp_NR + stats.entropy_NR).sum()

    def first(given):
        return jvp(f, (given,), (v,))[1]

    _, second = jvp(first, (params,), (v,))
    ends = [first(funcprobe.tree.axpy(s * eta, v, params)) for s in (1.0, -1.0)]
    # As above, a derivative higher.
    assert float(second) == pytest.approx(float(ends[0] - ends[1]) / (2 * eta), rel=1e-5)


def test_gemma2_has_its_cap_on_attention_only_under_eager(bases, tmp_path):
    base = bases("gemma2")
    save_adapter(plain(base), lora_config("gemma2", "all-linear"), base, tmp_path)
    assert load(tmp_path).attention == "eager"
    with pytest.raises(InputError, match=r"cannot be loaded.*scaled_dot_product_attention"):
        load(tmp_path, attention="sdpa")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_takes_from_the_base(bases, tmp_path, init, dtype):
    """peft takes the first factors out of the base when it loads, too; what was trained is what is."""
    base = bases("llama")
    config = lora_config("llama", "all-linear", init_lora_weights=init)
    trained = save_adapter(plain(base, dtype=dtype), config, base, tmp_path).eval()
    policy = load(tmp_path, dtype=dtype)
    reference = PeftModel.from_pretrained(plain(base, dtype=dtype), tmp_path).eval()
    ours_NLV, theirs_NLV = same_shapes_logits(policy.model, reference)
    assert torch.equal(ours_NLV, theirs_NLV)
    assert torch.equal(ours_NLV, same_shapes_logits(policy.model, trained)[1])
    if dtype == "float32":
        probe = funcprobe.bind(policy.model, max_tokens=64)
        three_routes(probe, random_like(probe.params)).require_equal(1e-4)
    # The adapter on the base as it is would be another policy.
    edit_json(tmp_path / "adapter_config.json", init_lora_weights=True)
    other = PeftModel.from_pretrained(plain(base, dtype=dtype), tmp_path).eval()
    assert float((same_shapes_logits(policy.model, other)[1] - ours_NLV).abs().max()) > 0.1
    edit_json(tmp_path / "adapter_config.json", init_lora_weights=init)
    for change in ({"dtype": "float64"}, {"mode": "qlora"}):
        with pytest.raises(InputError, match=f'"{init}" subtracts the initial factors from the base'):
            load(tmp_path, **change)


TARGETS = {"target_modules": ["q_proj", "v_proj"]}
OTHERS = {
    "vera": (VeraConfig(r=2, **TARGETS), "peft_type = VERA"),
    "ia3": (IA3Config(**TARGETS, feedforward_modules=[]), "peft_type = IA3"),
    # Its configuration is a LoraConfig, its forward another.
    "adalora": (AdaLoraConfig(total_step=10, **TARGETS), "peft_type = ADALORA"),
    "dora": (LoraConfig(use_dora=True, **TARGETS), "DoRA is not supported"),
    "dora-embedding": (
        LoraConfig(use_dora=True, target_modules=["embed_tokens"]),
        "DoRA is not supported",
    ),
    "kasa": (
        LoraConfig(r=2, kasa_config=KasaConfig(), **TARGETS),
        "kasa_config = .* KaSA is not supported",
    ),
    "alora": (
        LoraConfig(alora_invocation_tokens=[3], **TARGETS),
        "alora_invocation_tokens = .*: activated LoRA",
    ),
    "velora": (
        LoraConfig(velora_config=VeloraConfig(num_groups=4), **TARGETS),
        "has velora_config",
    ),
    "monteclora": (
        LoraConfig(monteclora_config=MontecloraConfig(), **TARGETS),
        "has monteclora_config",
    ),
    "bdlora": (
        LoraConfig(
            r=2,
            use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"]),
            **TARGETS,
        ),
        "has use_bdlora",
    ),
    "mica": (LoraConfig(r=2, init_lora_weights="mica", **TARGETS), 'init_lora_weights = "mica"'),
    "pissa-niter": (
        LoraConfig(r=2, init_lora_weights="pissa_niter_2", **TARGETS),
        'init_lora_weights = "pissa_niter_2".*save that base',
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_plain_lora_is_refused_by_name(bases, tmp_path, kind):
    config, says = OTHERS[kind]
    base = bases("llama")
    model = get_peft_model(plain(base), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=says) as refused:
        funcprobe.bind(load(tmp_path).model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lora_on_a_parameter(bases, tmp_path, dtype):
    """As peft puts it on fused experts; its own forward registers parametrizations, ours does not."""
    base = bases("llama")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight", "down_proj.weight"])
    save_adapter(plain(base), config, base, tmp_path)
    policy = load(tmp_path, dtype=dtype)
    assert all(".lora_" in name for name in policy.params)
    reference = PeftModel.from_pretrained(plain(base), tmp_path).to(getattr(torch, dtype)).eval()
    with arithmetic_of(policy.params):
        ours_NLV, theirs_NLV = same_shapes_logits(policy.model, reference)
    assert torch.equal(ours_NLV, theirs_NLV)
    probe = funcprobe.bind(policy.model, max_tokens=64)
    routes = three_routes(probe, v := random_like(probe.params))
    routes.require_equal(1e-4 if dtype == "float32" else 1e-12)
    if dtype == "float64":
        measured = central_difference(probe, v, 1e-6)
        assert measured == pytest.approx(routes.forward, abs=1e-6 * routes.size)
    assert not any("_activate_lora" in vars(module) for module in policy.model.modules())


LOFTQ = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        # Its data, or a GPU, would be needed to make one: the configuration alone decides.
        ({"init_lora_weights": "loftq", **LOFTQ}, 'init_lora_weights = "loftq" changed the base'),
        ({"init_lora_weights": "corda"}, 'init_lora_weights = "corda" changed the base'),
        ({"init_lora_weights": "lora_ga"}, 'init_lora_weights = "lora_ga" changed the base'),
        ({"lora_alpha": 0}, "lora_alpha = 0, which would disable.*set it to the training run's"),
    ],
)
def test_what_loading_cannot_repeat_is_refused_by_name(bases, tmp_path, changes, says):
    base = bases("llama")
    save_adapter(plain(base), lora_config("llama", "all-linear"), base, tmp_path)
    load(tmp_path)
    edit_json(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(InputError, match=says) as refused:
        load(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", False, None])
def test_an_initialisation_that_leaves_the_base_alone(bases, tmp_path, init):
    base = bases("llama")
    save_adapter(plain(base), lora_config("llama", "all-linear"), base, tmp_path)
    before = load(tmp_path)
    edit_json(tmp_path / "adapter_config.json", init_lora_weights=init)
    after = load(tmp_path)
    with torch.no_grad():
        logits = [policy.model(input_ids=BATCH.tokens_NL).logits for policy in (before, after)]
    assert torch.equal(*logits)
