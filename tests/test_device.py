"""The core and a small run on a device: `pytest --device cuda -m device`; on the CPU by default.

What is expected is computed on the CPU in float64 by other means: plain transformers a sequence at a
time, autograd's loops, finite differences, torch.optim. A batch is made twice: "shared", of unequal
rows with a prompt that several have, which are packed; and "even", of equal rows, which stay a row
each and whose grouped heads reach the attention kernels as they are.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

import funcprobe
from funcprobe import AdamGroup, AdamState, Batch, Entropy, InputError, Step, UpdateBatch, checks, tree
from funcprobe.policy.precision import StayFloat64, products_dtype, rounding

VOCABULARY = 13
PLAIN = Entropy(baseline="none")
DTYPES = [torch.float64, torch.float32]
# Of the largest number expected. float64: the finite differences aside, all is rounding, 1e-16 times
# the terms of a sum. float32: 6e-8 a rounding, some tens of them in a row, and CUDA's attention, which
# makes a float32 product of three of TF32.
EXACT = {torch.float64: 1e-10, torch.float32: 2e-4}

on_device = pytest.mark.device


@pytest.fixture(scope="module")
def device(request) -> torch.device:
    found = torch.device(request.config.getoption("--device"))
    if found.type == "cuda" and found.index is None:  # which some of torch.cuda's functions insist on
        return torch.device("cuda", torch.cuda.current_device())
    return found


class World(NamedTuple):
    """A policy on the device and its twin in float64 on the CPU, with the same numbers."""

    probe: funcprobe.Probe
    model: Any
    twin: Any
    batches: dict[str, Batch]
    v: funcprobe.Params  # of norm 1


def make_policy(dtype: torch.dtype, base: torch.dtype | None = None) -> Any:
    """Qwen2, two heads to each key, LoRA on all linears; every number is one that `base` has."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
        lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
        model = get_peft_model(Qwen2ForCausalLM(config), lora)
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.2)
    return model.to(base or torch.float32).to(dtype).eval()


def make_batch(lengths: list[tuple[int, int, int]]) -> Batch:
    """One sequence per (prompt number, prompt length, response length)."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=draw).tolist()

    prompts = {number: tokens(length) for number, length, _ in lengths}
    responses = [tokens(length) for _, _, length in lengths]
    return funcprobe.collate([prompts[n] for n, _, _ in lengths], responses, [n for n, _, _ in lengths])


BATCHES = {
    "shared": make_batch([(0, 7, 4), (0, 7, 2), (0, 7, 6), (1, 3, 5), (2, 5, 1), (3, 4, 3)]),
    "even": make_batch([(i, 4, 5) for i in range(5)]),
}


def random_like(params: funcprobe.Params, seed: int = 2) -> funcprobe.Params:
    draw = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(t.shape, generator=draw, dtype=torch.float64) for n, t in params.items()}
    return tree.scale(1 / tree.norm(drawn), drawn)


@pytest.fixture(scope="module")
def worlds(device) -> dict[torch.dtype, World]:
    found = {}
    for dtype in DTYPES:
        model = make_policy(dtype).to(device)
        probe = funcprobe.bind(model, max_tokens=24, entropy=PLAIN)
        twin = make_policy(torch.float64)
        found[dtype] = World(probe, model, twin, BATCHES, random_like(probe.params))
    return found


@pytest.fixture(params=DTYPES, ids=["float64", "float32"])
def world(request, worlds) -> World:
    return worlds[request.param]


@pytest.fixture
def world64(worlds) -> World:
    return worlds[torch.float64]


def own(twin: Any) -> funcprobe.Params:
    return funcprobe.trainable_params(twin)


def token_table(twin: Any, params: funcprobe.Params, batch: Batch) -> tuple[Tensor, Tensor]:
    """(l, h) [N, R] on the CPU: each sequence by itself through the whole model, in float64."""
    rows = []
    for tokens_L, P, T in zip(
        batch.tokens_NL, batch.prompt_length_N.tolist(), batch.response_length_N.tolist(), strict=True
    ):
        ids = tokens_L[: P + T]
        with StayFloat64():
            given = {"input_ids": ids[None], "use_cache": False, "attention_mask": torch.ones(1, P + T)}
            logits_LV = functional_call(twin, params, (), given).logits[0]
        logp_TV = logits_LV[P - 1 : P + T - 1].log_softmax(-1)
        rows.append((logp_TV[range(T), ids[P:]], -(logp_TV.exp() * logp_TV).sum(-1)))
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return pad([logp for logp, _ in rows]), pad([entropy for _, entropy in rows])


def moved(world: World, eta: float, v: funcprobe.Params | None = None) -> funcprobe.Params:
    v = world.v if v is None else v
    return {n: t + eta * v[n].to(t) for n, t in own(world.twin).items()}


def gradient(twin: Any, loss: Callable[[funcprobe.Params], Tensor]) -> funcprobe.Params:
    """By autograd, on the CPU."""
    params = {n: t.clone().requires_grad_() for n, t in own(twin).items()}
    return dict(zip(params, torch.autograd.grad(loss(params), list(params.values())), strict=True))


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.device.type == "cpu", "results are on the CPU"
    size = float(expected.abs().max())
    assert size > 0
    assert float((found - expected).abs().max()) <= tolerance * size


def flat(params: funcprobe.Params) -> Tensor:
    return torch.cat([tree.f64(params[n]).flatten() for n in sorted(params)])


def coefficients(batch: Batch) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    mask_NR = funcprobe.response_mask(batch)
    p_NR, q_NR = (torch.randn(mask_NR.shape, generator=draw).double() * mask_NR for _ in "pq")
    return p_NR, q_NR


@on_device
@pytest.mark.parametrize("rows", BATCHES)
def test_statistics(world, rows, device):
    batch = world.batches[rows]
    assert {p.device.type for p in world.model.parameters()} == {device.type}
    assert world.probe.forward.layout == "shared", world.probe.forward.notes
    found = world.probe.token_stats(world.probe.params, batch)
    for mine, expected in zip(found, token_table(world.twin, own(world.twin), batch), strict=True):
        close(mine, expected, EXACT[world.probe.forward.coarsest] / 10)  # one forward: less rounding


@on_device
@pytest.mark.parametrize("rows", BATCHES)
def test_gradients(world, rows):
    batch = world.batches[rows]
    p_NR, q_NR = coefficients(batch)

    def loss(params: funcprobe.Params) -> Tensor:
        logp_NR, entropy_NR = token_table(world.twin, params, batch)
        return (p_NR * logp_NR + q_NR * entropy_NR).sum()

    found = world.probe.weighted_grad(world.probe.params, batch, p_NR, q_NR)
    close(flat(found), flat(gradient(world.twin, loss)), EXACT[world.probe.forward.coarsest])


@on_device
@pytest.mark.parametrize("rows", BATCHES)
def test_tangents(world, rows):
    batch, e = world.batches[rows], 1e-4
    _, found = world.probe.tangents(world.probe.params, batch, world.v)
    sides = [token_table(world.twin, moved(world, sign * e), batch) for sign in (1, -1)]
    for mine, plus, minus in zip(found, *sides, strict=True):
        # Truncation is e^2 times the third derivative, some tens of the first one: below 1e-6 of it.
        close(mine, (plus - minus) / (2 * e), max(1e-6, EXACT[world.probe.forward.coarsest]))


@on_device
@pytest.mark.parametrize("rows", BATCHES)
def test_second_tangents(world64, rows):
    batch, e = world64.batches[rows], 1e-3
    *_, found = world64.probe.second_tangents(world64.probe.params, batch, world64.v)
    tables = [token_table(world64.twin, moved(world64, x * e), batch) for x in (1, 0, -1)]
    for mine, plus, middle, minus in zip(found, *tables, strict=True):
        # Truncation e^2 / 12 times the fourth derivative, rounding 1e-15 / e^2: both below 1e-4.
        close(mine, (plus - 2 * middle + minus) / e**2, 1e-4)


@on_device
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("route", ["alpha_vjp", "grad_dots"])
def test_every_sequences_gradient_along_a_direction(world, rows, route):
    """The alpha trick and the contraction against a loop of the sequences' gradients."""
    batch = world.batches[rows]
    p_NR, q_NR = coefficients(batch)
    expected_N = []
    for n in range(len(batch.prompt_N)):

        def loss(params: funcprobe.Params, n: int = n) -> Tensor:
            one = funcprobe.select(batch, torch.tensor([n]))
            logp_1R, entropy_1R = token_table(world.twin, params, one)
            T = logp_1R.shape[1]
            return (p_NR[n, :T] * logp_1R[0] + q_NR[n, :T] * entropy_1R[0]).sum()

        expected_N.append(tree.dot(gradient(world.twin, loss), world.v))
    found = getattr(world.probe, route)(world.probe.params, batch, world.v, p_NR=p_NR, q_NR=q_NR)
    found_N = found if route == "alpha_vjp" else found[0]
    close(found_N, torch.tensor(expected_N, dtype=torch.float64), EXACT[world.probe.forward.coarsest])


@on_device
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("base", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_beside_tangents_are_those_of_a_forward_to_the_bit(device, base, rows):
    """Each pass asks for attention in the same words: on a GPU they decide which kernel answers."""
    model = make_policy(torch.float32 if base is torch.bfloat16 else base, base)
    for name, p in model.named_parameters():
        p.data = p.data.to(base if "lora_" not in name else p.dtype)
    probe = funcprobe.bind(model.to(device), max_tokens=64)
    stats, tangent = probe.tangents(probe.params, BATCHES[rows], random_like(probe.params))
    for mine, expected in zip(stats, probe.token_stats(probe.params, BATCHES[rows]), strict=True):
        assert torch.equal(mine, expected)
    if base is torch.bfloat16:  # 8 bits: 0.4 % a rounding, some tens of them, of sums that cancel
        twin = make_policy(torch.float64, base)
        table = token_table(twin, own(twin), BATCHES[rows])
        close(stats.logp_NR, table[0], 0.05)
        close(stats.entropy_NR, table[1], 0.05)
        exact = funcprobe.bind(twin, max_tokens=64)
        _, slope = exact.tangents(exact.params, BATCHES[rows], random_like(probe.params))
        error_NR = tangent.logp_NR - slope.logp_NR
        assert float(error_NR.norm()) < 0.25 * float(slope.logp_NR.norm())


def after_one_step(world: World, device: torch.device) -> tuple[AdamState, funcprobe.Params]:
    """Adam's state and the parameters after a step of torch's own, on the device, of two groups."""
    params = {n: torch.nn.Parameter(t.clone()) for n, t in world.probe.params.items()}
    parts = [n for n in params if "lora_A" in n], [n for n in params if "lora_B" in n]
    lrs, decays = (1e-3, 2e-3), (0.1, 0.0)
    groups = [
        {"params": [params[n] for n in names], "lr": lr, "weight_decay": decay}
        for names, lr, decay in zip(parts, lrs, decays, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-7)
    for n, t in random_like(world.probe.params, seed=5).items():
        params[n].grad = -t.to(params[n])
    optimizer.step()
    moments = [{n: optimizer.state[p][k] for n, p in params.items()} for k in ("exp_avg", "exp_avg_sq")]
    assert {t.device.type for t in moments[0].values()} == {device.type}
    named = [
        AdamGroup(tuple(names), lr, 0.9, 0.95, 1e-7, decay)
        for names, lr, decay in zip(parts, lrs, decays, strict=True)
    ]
    state = AdamState(*moments, dict.fromkeys(params, 1), tuple(named))

    def next_step(Y: funcprobe.Params) -> funcprobe.Params:
        for n, p in params.items():
            p.grad = -Y[n].to(p)
        torch.nn.utils.clip_grad_norm_(list(params.values()), 0.5)
        before = {n: p.detach().clone() for n, p in params.items()}
        optimizer.step()
        return {n: (p.detach() - before[n]) / lrs[0] for n, p in params.items()}

    return state._replace(exp_avg={n: t.clone() for n, t in state.exp_avg.items()}), next_step, params


@on_device
def test_the_direction_is_the_step_that_torch_takes_there(world, device):
    state, next_step, params = after_one_step(world, device)
    state = state._replace(exp_avg_sq={n: t.clone() for n, t in state.exp_avg_sq.items()})
    Y = tree.scale(3.0, random_like(world.probe.params, seed=6))
    here = {n: p.detach().clone() for n, p in params.items()}
    found = funcprobe.update_direction(here, Y, state, rule="adamw", max_grad_norm=0.5)
    # A step moves parameters by 1e-3 of what they are, so that float32 has four digits of it.
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-3}[world.probe.forward.coarsest]
    close(flat(found.total), flat(next_step(Y)), tolerance)
    assert found.clip_coefficient < 1


def entropy_at(world: World, eta: float, v: funcprobe.Params, batch: Batch) -> float:
    """Per token, Rao-Blackwell, weights of the prefix, as the definition has it."""
    (there, h), (here, _) = (token_table(world.twin, moved(world, e, v), batch) for e in (eta, 0.0))
    above = below = 0.0
    for n, T in enumerate(batch.response_length_N.tolist()):
        for k in range(T):
            weight = float((there[n, :k] - here[n, :k]).sum().exp())
            above, below = above + weight * float(h[n, k]), below + weight
    return above / below


@on_device
def test_prediction_and_measured_change(world64, device):
    probe, batch = world64.probe, world64.batches["shared"]
    coef_NR, _ = coefficients(world64.batches["even"])
    state, _, _ = after_one_step(world64, device)
    step = Step(max_grad_norm=0.5)
    update = UpdateBatch(world64.batches["even"], coef_NR, torch.ones(len(coef_NR)))
    prediction = probe.predict(probe.params, batch, update, state, step=step)
    v = prediction.direction.total

    def objective(params: funcprobe.Params) -> Tensor:
        return (coef_NR * token_table(world64.twin, params, update.batch)[0]).sum()

    close(flat(prediction.Y), flat(gradient(world64.twin, objective)), 1e-10)
    e = 1e-4 / tree.norm(v)
    change = {x: entropy_at(world64, x, v, batch) - entropy_at(world64, 0.0, v, batch) for x in (e, -e)}
    # A symmetric difference: e^2 times the third derivative, and 1e-16 / e.
    assert prediction.derivative == pytest.approx((change[e] - change[-e]) / (2 * e), rel=1e-6)
    assert prediction.bars_dot == pytest.approx(prediction.derivative, rel=1e-10)
    measured = probe.measure(probe.params, batch, v, e, prediction.stats)
    assert measured.delta == pytest.approx(change[e], rel=1e-8)  # 1e-16 of the entropy, over the change
    assert probe.measure(probe.params, batch, v, 0.0, prediction.stats).delta == 0


@on_device
def test_checks(world, device):
    probe, batch = world.probe, world.batches["shared"]
    coef_NR, _ = coefficients(world.batches["even"])
    state, _, _ = after_one_step(world, device)
    update = UpdateBatch(world.batches["even"], coef_NR, torch.ones(len(coef_NR)))
    prediction = probe.predict(probe.params, batch, update, state)
    v, stats, given = prediction.direction.total, prediction.stats, (probe.forward, 64)
    seen = [
        checks.adapter_changes_logits(probe.params, batch, stats, *given),
        checks.gradients_reach("X", prediction.X),
        checks.routes_agree(prediction, probe.forward),
        checks.alpha_cases(probe.params, batch, v, *given),
        checks.repeat_is_identical(
            probe.params, batch, probe.token_stats(probe.params, batch), probe.forward, 24
        ),
        checks.eta_zero(probe.params, batch, v, stats, probe.forward, entropy=PLAIN, max_tokens=24),
    ]
    if probe.forward.coarsest is torch.float64:
        seen.append(checks.float64_throughout(world.model, batch))
    assert [one for one in seen if not one.passed] == []


@on_device
@pytest.mark.parametrize(
    "words", ["CUBLAS_STATUS_ALLOC_FAILED when calling", "CUDA error: out of memory"]
)
def test_memory_that_runs_out_halves_a_microbatch(world64, device, words):
    """On a GPU by its own allocator; elsewhere by what CUDA's libraries say, in plain RuntimeErrors."""
    probe, batch, bounds = world64.probe, world64.batches["even"], []
    expected = probe.token_stats(probe.params, batch)
    if device.type == "cuda":
        held, whole = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction((held + 2**30) / whole, device)

    def hidden(params: funcprobe.Params, rows: Any) -> Tensor:
        if device.type == "cuda":
            torch.empty(rows.tokens * 2**25, dtype=torch.uint8, device=device)  # up to 32 tokens fit
        elif rows.tokens > 16:
            raise RuntimeError(words)
        return probe.forward.hidden(params, rows)

    try:
        forward = probe.forward._replace(hidden=hidden, halved=bounds.append)
        found = funcprobe.token_stats(probe.params, batch, forward, max_tokens=64)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert bounds
    assert bounds[-1] <= 20
    close(found.logp_NR, expected.logp_NR, 1e-12)


@on_device
def test_memory_that_runs_out_elsewhere_is_said_in_a_line(world64, device, monkeypatch, small):
    from funcprobe.adapters.checkpoint.model import Policy, load_policy
    from funcprobe.adapters.config.schema import PolicyConfig, SamplingConfig
    from funcprobe.adapters.sampling.generate import sample_responses

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    policy = Policy(world64.model, None, world64.probe.params, (0,), 0, "", None, "sdpa", ())
    monkeypatch.setattr(world64.model, "generate", full)
    with pytest.raises(InputError, match="memory ran out while one response was sampled"):
        sample_responses(policy, [[1], [2], [3]], SamplingConfig(), 0)
    monkeypatch.setattr(type(world64.model), "to", full)
    with pytest.raises(InputError, match=f"does not fit into the memory of {device}"):
        load_policy(PolicyConfig(checkpoint=str(small.checkpoint)), device)


@on_device
def test_a_batch_that_is_not_on_the_cpu_is_refused_in_a_line(world64, device):
    away = "meta" if device.type == "cpu" else device.type
    batch = Batch(*(x.to(away) for x in world64.batches["even"]))
    for call in (world64.probe.token_stats, partial(world64.probe.alpha_vjp, mu=world64.v)):
        with pytest.raises(InputError, match=f"the batch is on {away}.*, the CPU is expected"):
            call(world64.probe.params, batch)


@on_device
def test_responses_repeat_and_random_states_stay(world, device):
    from funcprobe.adapters.checkpoint.model import Policy
    from funcprobe.adapters.config.schema import SamplingConfig
    from funcprobe.adapters.sampling.generate import sample_responses

    policy = Policy(world.model, None, world.probe.params, (0,), 0, "", None, "sdpa", ())
    config = SamplingConfig(max_new_tokens=6, generation_batch=4)
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9], [2, 4]]

    def states() -> list[Tensor]:
        own_state = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *own_state]

    before = states()
    first, again, other = (sample_responses(policy, prompts, config, seed).ids for seed in (1, 1, 2))
    assert first == again != other
    assert all(map(torch.equal, before, states()))


@on_device
def test_a_live_optimizers_state_is_copied_to_the_cpu(world, device):
    from funcprobe.adapters.optimizer import live_adam_state

    named = [(n, p) for n, p in world.model.named_parameters() if p.requires_grad]
    kept = {n: p.detach().clone() for n, p in named}
    optimizer = torch.optim.AdamW(named, lr=1e-3, fused=True)  # whose step is a tensor on the device
    for n, t in random_like(world.probe.params, seed=7).items():
        dict(named)[n].grad = t.to(dict(named)[n])
    optimizer.step()
    optimizer.zero_grad()
    state, _ = live_adam_state(optimizer, world.model, world.probe.params)
    for n, p in named:
        assert torch.equal(state.exp_avg[n], optimizer.state[p]["exp_avg"].cpu())
        assert state.exp_avg_sq[n].device.type == "cpu"
        p.data.copy_(kept[n])
    assert set(state.step.values()) == {1}


class Small(NamedTuple):
    """A toy taught for few steps, and the settings of a run of it that takes a second."""

    checkpoint: Path
    prompts: Path
    settings: list[str]


@pytest.fixture(scope="module")
def small(device, tmp_path_factory) -> Small:
    from funcprobe.adapters.checkpoint.toy import Recipe, ensure_toy

    folder = tmp_path_factory.mktemp("device")
    recipe = Recipe(hidden=32, layers=1, supervised_steps=25, policy_steps=2)
    toy = ensure_toy(folder / "toy", recipe=recipe)
    saved = load_file(toy.checkpoint / "adapter_model.safetensors")
    draw = torch.Generator().manual_seed(4)
    for name in (n for n in saved if "lora_B" in n):  # as good as untrained
        saved[name] = 0.1 * torch.randn(saved[name].shape, generator=draw)
    save_file(saved, toy.checkpoint / "adapter_model.safetensors")
    rewards = folder / "rewards.py"  # so short a training gets no sum right
    rewards.write_text(
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    settings = {
        "reward.function": f'"{rewards}:length"',
        "run.device": f'"{device}"',
        "run.folder": f'"{folder / "runs"}"',
        "policy.checkpoint": f'"{toy.checkpoint}"',
        "prompts.source": f'"{toy.prompts}"',
        "sampling.B_E": 32,
        "sampling.B_U": 6,
        "sampling.G": 4,
        "run.max_tokens": 512,
        "measure.etas": [1e-7, 1e-6],
    }
    return Small(toy.checkpoint, toy.prompts, [f"{key}={value}" for key, value in settings.items()])


@on_device
def test_a_small_run_of_the_quickstart(small, device):
    """All checks pass, what is measured tends to what is predicted, and a CPU finds the same."""
    from rich.console import Console

    from funcprobe.adapters import run as shell
    from funcprobe.adapters.config.file import read_config
    from funcprobe.adapters.console import Narrator

    quickstart = Path(__file__).parents[1] / "configs" / "quickstart.toml"

    def run(*more: str) -> tuple[Any, Path]:
        config = read_config(quickstart, [*small.settings, *more])
        return shell.run(config, Narrator(Console(quiet=True)))

    results, folder = run()
    failed = [c for c in results.checks if not c.passed and not c.advisory]
    assert failed == []
    peak = results.cost.total.device_peak_bytes
    assert (peak is None) == (not torch.cuda.is_initialized())
    # At eta 1e-7 the quadratic term is of that order, relative; the next step's lr is in the table too.
    first = results.sweep[0]
    assert first.ratio.value == pytest.approx(1, abs=1e-3)
    supplied = [f'rollouts.{x}="{folder / "rollouts" / name}"' for x, name in ROLLOUTS.items()]
    again, _ = run('run.name="again"', 'run.device="cpu"', *supplied)
    for key in ("derivative", "bars_dot", "from_momentum"):
        theirs, ours = (getattr(r.first_order, key).value for r in (again, results))
        assert ours == pytest.approx(theirs, rel=1e-7)  # 1e-16 over a cancelling sum


ROLLOUTS = {"eval": "eval.parquet", "update": "update.parquet"}


@on_device
def test_the_probe_inside_a_trainer_on_the_device(small, device, tmp_path):
    from funcprobe.adapters.checkpoint.model import load_policy
    from funcprobe.adapters.config.schema import Config, PolicyConfig
    from funcprobe.adapters.trainers import ProbeCallback

    loaded = load_policy(PolicyConfig(checkpoint=str(small.checkpoint), dtype="float32"), device)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )
    rows = [{"input_ids": [9, 8, 7, k], "labels": [9, 8, 7, k]} for k in range(10, 26)]
    trainer = Trainer(loaded.model, arguments, train_dataset=rows, processing_class=loaded.tokenizer)
    config = Config.model_validate(
        {
            "prompts": {"source": str(small.prompts)},
            "sampling": {"B_E": 32, "max_new_tokens": 8},
            "run": {"max_tokens": 512},
        }
    )
    trainer.add_callback(ProbeCallback(trainer, every=2, config=config))
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "funcprobe/derivative" in entry)
    reverse, forward = logged["funcprobe/derivative_reverse"], logged["funcprobe/derivative"]
    assert reverse == pytest.approx(forward, rel=1e-3)
    # First order at lr 1e-4, in float32.
    assert logged["funcprobe/ratio"] == pytest.approx(1, abs=0.1)


def test_products_in_tf32_count_as_half_precision():
    """As a trainer switches them on, the bounds of what is compared at bind follow."""
    matmul, cuda = torch.backends.cuda.matmul, torch.device("cuda")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert products_dtype(torch.float32, cuda) is torch.float16
        assert products_dtype(torch.float64, cuda) is torch.float64
        assert products_dtype(torch.float32, torch.device("cpu")) is torch.float32
        matmul.fp32_precision = "ieee"
        assert products_dtype(torch.float32, cuda) is torch.float32
    finally:
        matmul.fp32_precision = before
    assert rounding(torch.ones(1)) == pytest.approx(1000 * 2**-23)


@on_device
def test_a_policy_is_bound_where_products_are_tf32(device):
    if device.type != "cuda":
        pytest.skip("TF32 is CUDA's")
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        probe = funcprobe.bind(make_policy(torch.float32).to(device))
    finally:
        matmul.fp32_precision = before
    assert probe.forward.coarsest is torch.float16
    assert probe.forward.layout == "shared", probe.forward.notes
