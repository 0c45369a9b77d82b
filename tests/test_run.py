"""A whole run: what it writes, what it leaves alone, what it does not compute again."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import funcprobe
from funcprobe.adapters import run as run_module
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.rollouts import load_rollouts, save_rollouts, to_batch
from funcprobe.adapters.rollouts.ragged import Ragged
from funcprobe.adapters.stages import batches, plan
from support.checkpoints import edit_json, sets


def without_cost(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "cost"}


def derivative(document: dict[str, Any]) -> float:
    return document["first_order"]["derivative"]["value"]


def rollout_bytes(name: str) -> list[bytes]:
    return [Path(f"runs/{name}/rollouts/{x}.parquet").read_bytes() for x in ("eval", "update")]


# What it writes


def test_the_run_folder_holds_what_was_run(probe, checkpoint) -> None:
    document = probe("one", run__seed=3)
    folder = Path("runs/one")
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert found == [
        "config.toml",
        "direction.safetensors",
        "manifest.json",
        "modules.parquet",
        "results.json",
        "rollouts/eval.parquet",
        "rollouts/update.parquet",
        "run.log",
        "sequences.parquet",
        "tokens.parquet",
    ]
    config = read_config(folder / "config.toml")
    assert (config.run.seed, config.run.name) == (3, "one")
    assert config.policy.checkpoint == str(checkpoint.adapter)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 3
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["optimizer"]["positional"] is True
    assert manifest["inputs"]["optimizer"].keys() == {"optimizer.pt"}
    update = load_rollouts(folder / "rollouts/update.parquet", 14, rewards=True)
    assert update.reward == [float(len(text)) for text in update.response]
    assert sum(update.advantage) == pytest.approx(0, abs=1e-12)
    assert [update.prompt_index.count(i) for i in set(update.prompt_index)] == [3] * 4
    evaluated = load_rollouts(folder / "rollouts/eval.parquet", 14, rewards=False)
    assert len(evaluated.prompt_index) == 12
    assert document["counts"]["E_tokens"] == sum(map(len, evaluated.response_ids))
    assert document["counts"]["U_tokens"] == sum(map(len, update.response_ids))
    assert document["mean_reward"]["value"] == pytest.approx(sum(update.reward) / 12)
    assert all(check["passed"] or check["advisory"] for check in document["checks"])


def every_number(value: Any, path: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {k: v for key, x in value.items() for k, v in every_number(x, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, x in enumerate(value) for k, v in every_number(x, f"{path}/{i}").items()}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {path: float(value)} if is_number else {}


@pytest.mark.slow
def test_every_quantity_has_its_unit_and_normalisation(probe) -> None:
    document = probe("one")

    def quantities(value: Any) -> list[dict[str, Any]]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        own = [value] if isinstance(value, dict) and "value" in value else []
        return own + [q for x in inner for q in quantities(x)]

    found = quantities(document)
    assert len(found) > 40
    for quantity in found:
        assert quantity["unit"]
        assert quantity["normalised_by"]
    assert "raises the entropy" in document["conventions"]["sign"]


def test_prediction_and_measurement_meet_at_a_small_eta(probe) -> None:
    document = probe("one", measure__etas=[1e-9, 1e-8, 1e-7])
    ratios = [row["ratio"]["value"] for row in document["sweep"]]
    # The deviation is linear in eta; at 1e-9 it is 1e-6 of the change and rounding is 1e-5 of it.
    assert abs(ratios[0] - 1) < 1e-4
    first = document["first_order"]
    assert first["bars_dot"]["value"] == pytest.approx(derivative(document), rel=1e-9)
    parts = [first[f"from_{part}"]["value"] for part in ("update", "momentum", "weight_decay")]
    assert all(parts)
    assert sum(parts) == pytest.approx(derivative(document), rel=1e-9)


def test_the_direction_is_what_torchs_adamw_does(probe, checkpoint) -> None:
    """An optimizer restored from the file takes the step on the run's own U, by plain autograd."""
    document = probe("one", policy__dtype="float32", optimizer__max_grad_norm=0.01)
    assert document["clip_coefficient"] < 0.5  # clipping has something to do
    folder = Path("runs/one")
    update = load_rollouts(folder / "rollouts/update.parquet", 14, rewards=True)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.base)
    model = PeftModel.from_pretrained(base, checkpoint.adapter, is_trainable=True).eval()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": list(named.values())}, {"params": []}]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(torch.load(checkpoint.adapter / "optimizer.pt", weights_only=True))
    lr = optimizer.param_groups[0]["lr"]
    tokens = sum(map(len, update.response_ids))
    loss = torch.zeros(())
    for x, y, advantage in zip(update.prompt_ids, update.response_ids, update.advantage, strict=True):
        logits = model(torch.tensor([[*x, *y]])).logits[0, len(x) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(y)[:, None]).sum()
        loss = loss - advantage * logp / tokens  # "dapo"
    loss.backward()
    torch.nn.utils.clip_grad_norm_(named.values(), 0.01)
    before = {n: p.detach().clone() for n, p in named.items()}
    optimizer.step()
    direction = load_file(folder / "direction.safetensors")
    assert direction.keys() == named.keys()
    for name, v in direction.items():
        taken = (named[name].detach() - before[name]).double() / lr
        # theta of about 1 is stored to 6e-8, which at lr 1e-3 is 6e-5 of v, entries about 1.
        assert float((taken - v).abs().max()) < 5e-4, name
        assert float(v.abs().max()) > 0.1


def test_the_entropy_is_that_of_the_policy_that_was_sampled(probe, checkpoint) -> None:
    """At temperature 0.5: the mean entropy of softmax(logits / 0.5), by peft's own model."""
    document = probe("one", policy__dtype="float32", sampling__temperature=0.5)
    drawn = load_rollouts(Path("runs/one/rollouts/eval.parquet"), 14, rewards=False)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.base)
    model = PeftModel.from_pretrained(base, checkpoint.adapter).eval()
    entropies: list[float] = []
    for x, y in zip(drawn.prompt_ids, drawn.response_ids, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*x, *y]])).logits[0, len(x) - 1 : -1]
        entropies += torch.distributions.Categorical(logits=logits / 0.5).entropy().tolist()
    # float32: about 1e-6 for each of some fifty entropies around 1
    assert document["entropy"]["value"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


# What it leaves alone


def test_parameters_buffers_and_random_state_are_bit_identical(probe, monkeypatch) -> None:
    seen: dict[str, Any] = {}
    load_policy = plan.load_policy

    def remembering(*args: Any) -> Any:
        policy = load_policy(*args)
        tensors = (*policy.model.named_parameters(), *policy.model.named_buffers())
        seen.update(model=policy.model, before={n: t.clone() for n, t in tensors})
        return policy

    monkeypatch.setattr(plan, "load_policy", remembering)
    torch.manual_seed(8)
    state = torch.get_rng_state()
    probe("one")
    assert torch.equal(torch.get_rng_state(), state)
    after = dict((*seen["model"].named_parameters(), *seen["model"].named_buffers()))
    assert after.keys() == seen["before"].keys()
    assert len(after) > 30
    for name, tensor in after.items():
        assert torch.equal(tensor, seen["before"][name]), name
        assert tensor.grad is None, name


# The same again, and what may not matter


def test_the_same_seed_gives_the_same_results(probe) -> None:
    one, two, other = probe("one", fresh=True), probe("two", fresh=True), probe("three", run__seed=1)
    assert without_cost(one) == without_cost(two)
    assert rollout_bytes("one") == rollout_bytes("two")
    assert derivative(other) != derivative(one)
    assert rollout_bytes("three") != rollout_bytes("one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "entropy",
    [
        {},
        # In the default suite test_a_batch_of_many_microbatches has the passes, before any estimator.
        *(
            pytest.param(given, marks=pytest.mark.slow)
            for given in (
                {"entropy__per": "sequence", "entropy__weights": "sequence"},
                {"entropy__integrand": "sampled", "optimizer__rule": "precondition"},
            )
        ),
    ],
)
def test_the_size_of_a_microbatch_does_not_matter(probe, entropy) -> None:
    whole, split = probe("one", **entropy), probe("two", run__max_tokens=11, **entropy)
    assert rollout_bytes("one") == rollout_bytes("two")
    a, b = (every_number(x["first_order"] | {"norms": x["norms"]}) for x in (whole, split))
    assert a.keys() == b.keys()
    assert len(a) > 10
    for key, value in a.items():
        assert b[key] == pytest.approx(value, rel=1e-9), key
    noise = whole["fit"]["rounding_noise"]["value"]
    for one, two in zip(whole["sweep"], split["sweep"], strict=True):
        expected = one["measured"]["value"]
        assert two["measured"]["value"] == pytest.approx(expected, rel=1e-9, abs=50 * noise)


@pytest.mark.slow
def test_the_size_of_a_generation_batch_changes_nothing(probe) -> None:
    probe("one")
    probe("two", fresh=True, sampling__generation_batch=5)
    assert rollout_bytes("one") == rollout_bytes("two")


def without_errors(document: Any) -> Any:
    """All but the cost and the standard errors of E."""
    if isinstance(document, dict):
        errors = ("cost", "se_", "_se", "interval", "linear_until")
        kept = {k: v for k, v in document.items() if not any(part in k for part in errors)}
        if isinstance(kept.get("verdict"), dict):  # of the run: bounds, and what they establish
            del kept["verdict"]
        return {k: without_errors(v) for k, v in kept.items()}
    return [without_errors(v) for v in document] if isinstance(document, list) else document


# Stages


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often the three expensive things are done."""
    seen: Counter = Counter()

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(batches, "sample_responses")
    count(funcprobe, "first_order_passes")
    count(funcprobe, "token_stats")
    return seen


@pytest.mark.slow
def test_stages_whose_inputs_are_the_same_are_not_computed_again(
    probe, calls, damaged, monkeypatch
) -> None:
    # They are no stage, and not read here.
    monkeypatch.setattr(run_module, "check", lambda *_: [])
    monkeypatch.setattr(run_module, "_foretell", lambda *_, **__: None)  # nor is what it tries

    def done(name: str, **kwargs: Any) -> tuple[int, int, int]:
        """Batches sampled, first orders computed, forwards of the sweep."""
        calls.clear()
        probe(name, of=damaged, measure__next_lr=False, **kwargs)
        return calls["sample_responses"], calls["first_order_passes"], calls["token_stats"]

    # Two etas, four tiny ones for the rounding, two for the second derivative.
    first = {"measure__etas": [1e-5, 1e-4]}
    assert done("one", **first) == (2, 1, 8)
    before = without_cost(json.loads(Path("runs/one/results.json").read_text()))
    assert done("one", **first) == (0, 0, 0)
    assert without_cost(json.loads(Path("runs/one/results.json").read_text())) == before
    assert done("two", measure__etas=[1e-5, 1e-4, 1e-3]) == (0, 0, 1)
    assert done("two", optimizer__rule="sgd", **first) == (0, 1, 8)
    assert done("two", optimizer__rule="precondition", **first) == (0, 1, 8)
    assert done("two", entropy__per="sequence", **first) == (0, 1, 0)  # same v: arithmetic alone
    assert done("two", objective__preset="rloo", **first) == (0, 1, 8)
    assert done("two", sampling__B_E=13, **first)[0] == 1  # E alone
    assert done("two", sampling__G=4, **first)[0] == 1  # U alone
    assert done("two", policy__max_trainable=10**6, **first) == (0, 0, 0)
    assert done("two", fresh=True, **first) == (2, 1, 8)
    state = torch.load(damaged.adapter / "optimizer.pt", weights_only=True)
    state["state"][0]["exp_avg"] *= 2
    torch.save(state, damaged.adapter / "optimizer.pt")
    assert done("two", **first) == (0, 1, 8)
    damaged.rewards.write_text(damaged.rewards.read_text().replace("len(text)", "len(text) ** 2"))
    assert done("two", **first) == (0, 1, 8)
    damaged.prompts.write_text(damaged.prompts.read_text().replace("3+4", "5+5"))
    assert done("two", **first) == (1, 1, 8)  # one of the batches had drawn it
    edit_json(damaged.adapter / "adapter_config.json", lora_alpha=40)  # same tensors, another policy
    assert done("two", **first) == (2, 1, 8)
    edit_json(damaged.adapter / "tokenizer_config.json", eos_token="9")
    assert done("two", **first) == (2, 1, 8)
    weights = damaged.base / "model.safetensors"
    assert done("two", **first) == (0, 0, 0)
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1  # one bit of one weight
    weights.write_bytes(data)
    assert done("two", **first) == (2, 1, 8)


@pytest.mark.slow
def test_responses_of_a_stage_are_read_by_the_tokenizer_of_now(probe, calls, damaged) -> None:
    """The text, and so the rewards, of the same tokens: one of them is written otherwise."""
    probe("one", of=damaged)
    one = pq.read_table("runs/one/rollouts/update.parquet").to_pydict()
    digit = next(x for x in "06789" if any(x in text for text in one["response"]))  # in no prompt
    path = damaged.adapter / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["xyz"] = vocabulary.pop(digit)
    path.write_text(json.dumps(content))
    calls.clear()
    probe("two", of=damaged)
    assert calls["sample_responses"] == 0
    two = pq.read_table("runs/two/rollouts/update.parquet").to_pydict()
    assert two["response_ids"] == one["response_ids"]
    assert two["response"] == [text.replace(digit, "xyz") for text in one["response"]]
    assert two["reward"] == [len(text) for text in two["response"]]


@pytest.mark.slow
def test_second_derivatives_of_another_direction_are_not_taken_from_a_stage(probe) -> None:
    """Two rules in one folder of stages, both "exact", against the same computed anew."""
    given: dict[str, Any] = {"measure__second_order": "exact"}
    rules = ("sgd", "precondition")
    after = [probe("one", optimizer__rule=rule, **given) for rule in rules]
    anew = [probe("two", fresh=True, optimizer__rule=rule, **given) for rule in rules]
    first, second = (document["second_order"]["second_derivative"]["value"] for document in anew)
    assert abs(second / first - 1) > 1e-3
    assert [without_cost(x) for x in after] == [without_cost(x) for x in anew]


@pytest.mark.slow
def test_another_temperature_of_the_same_rollouts_is_another_state(probe) -> None:
    """E and U, brought, differ in nothing but the temperature they say they are of."""
    probe("one")
    given: dict[str, Any] = {"rollouts__eval": "e.parquet", "rollouts__update": "u.parquet"}

    def brought(temperature: float, **kwargs: Any) -> dict[str, Any]:
        for name, file in (("eval", "e"), ("update", "u")):
            drawn = load_rollouts(
                Path(f"runs/one/rollouts/{name}.parquet"), 14, rewards=name == "update"
            )
            save_rollouts(drawn._replace(temperature=temperature), Path(f"{file}.parquet"))
        return probe("two", **given, **kwargs)

    warm, after = brought(1.0), brought(0.5)
    assert abs(derivative(after) / derivative(warm) - 1) > 1e-3
    assert without_cost(after) == without_cost(brought(0.5, fresh=True))


# Rollouts that are brought


def test_brought_rollouts_are_as_good_as_the_sampled_ones_they_are(probe, calls) -> None:
    # Blocks of prompts are others than those of draws, and X is summed over them: it rounds otherwise.
    off = {"attribution__level": "off"}
    sampled = probe("one", sampling__temperature=0.8, **off)
    calls.clear()
    brought = {
        **off,
        "rollouts__eval": "runs/one/rollouts/eval.parquet",
        "rollouts__update": "runs/one/rollouts/update.parquet",
        "prompts__source": "/gone.jsonl",  # not needed any more, nor is the reward
        "reward__function": "gone:gone",
    }
    again = probe("two", **brought)
    assert calls["sample_responses"] == 0
    # All but the standard errors: the draws of a batch that is brought may be dependent.
    (of_U,) = (check for check in again["checks"] if check["name"] == "U is sampled from the policy")
    assert of_U["passed"]
    again["checks"].remove(of_U)
    assert without_errors(again) == without_errors(sampled)
    assert again["first_order"]["se_given_U"] != sampled["first_order"]["se_given_U"]
    assert rollout_bytes("one") == rollout_bytes("two")
    half = probe("three", rollouts__eval=brought["rollouts__eval"], sampling__temperature=0.8, **off)
    assert without_errors(half) == without_errors(sampled)


@pytest.mark.slow
def test_the_samplers_own_probabilities_make_the_ratios(probe, checkpoint) -> None:
    # Without a baseline, as E with sampler_logp has none.
    off = {"attribution__level": "off"}  # see above
    sampled = probe("one", entropy__baseline="none", **off)
    path = Path("runs/one/rollouts/eval.parquet")
    drawn = load_rollouts(path, 14, rewards=False)
    config = read_config(Path("runs/one/config.toml"))
    policy = plan.load_policy(config.policy, torch.device("cpu"))
    bound = funcprobe.bind(policy.model, max_tokens=config.run.max_tokens)
    logp_NR = bound.token_stats(bound.params, to_batch(drawn)).logp_NR
    own = [row[: len(y)].tolist() for row, y in zip(logp_NR, drawn.response_ids, strict=True)]
    save_rollouts(drawn._replace(sampler_logp=own), Path("own.parquet"))
    same = probe("two", rollouts__eval="own.parquet", **off)
    for part in ("first_order", "sweep"):  # every ratio is exp(0), and 1.0 changes no product
        assert without_errors(same[part]) == without_errors(sampled[part])

    # A sampler that was half as sure of every first token: ratios of 2 for all, which cancel.
    halved = [[row[0] - 0.6931471805599453, *row[1:]] for row in own]
    save_rollouts(drawn._replace(sampler_logp=halved), Path("halved.parquet"))
    even = probe("three", rollouts__eval="halved.parquet", entropy__weights="sequence", **off)
    plain = probe("four", entropy__weights="sequence", entropy__baseline="none")
    assert derivative(even) == pytest.approx(derivative(plain), rel=1e-9)

    # One that favoured the first response alone changes the result.
    skewed = [[logp / 2 for logp in own[0]], *own[1:]]
    save_rollouts(drawn._replace(sampler_logp=skewed), Path("skewed.parquet"))
    other = probe("five", rollouts__eval="skewed.parquet")
    assert abs(derivative(other) / derivative(sampled) - 1) > 1e-3
    assert all(check["passed"] or check["advisory"] for check in other["checks"])


@pytest.mark.slow
def test_brought_rollouts_that_do_not_fit(probe, command, checkpoint) -> None:
    probe("one", sampling__temperature=0.5)
    update = load_rollouts(Path("runs/one/rollouts/update.parquet"), 14, rewards=True)
    drawn = load_rollouts(Path("runs/one/rollouts/eval.parquet"), 14, rewards=False)
    save_rollouts(drawn._replace(reward=None), Path("unscored.parquet"))
    firsts = slice(0, None, 3)
    single = update._replace(
        **{k: v[firsts] for k, v in update._asdict().items() if isinstance(v, list | Ragged)}
    )
    save_rollouts(single, Path("single.parquet"))
    one_prompt = update._replace(
        **{k: v[:3] for k, v in update._asdict().items() if isinstance(v, list | Ragged)}
    )
    save_rollouts(one_prompt, Path("one_prompt.parquet"))
    padded = [update.response_ids[0], [5, 1, 0], *update.response_ids[2:]]
    save_rollouts(update._replace(response_ids=padded), Path("padded.parquet"))
    save_rollouts(update._replace(reward=[0.3] * 12, advantage=None), Path("equal.parquet"))
    huge = [1e200, *update.reward[1:]]
    save_rollouts(update._replace(reward=huge, advantage=None), Path("huge.parquet"))
    save_rollouts(update._replace(temperature=1 + 2e-6), Path("warmer.parquet"))
    for given, said in (
        ({"rollouts.update": "runs/one/rollouts/update.parquet"}, "E has temperature 1 and U 0.5"),
        ({"rollouts.update": "warmer.parquet"}, "E has temperature 1 and U 1.000002,"),
        (
            {"rollouts.update": "single.parquet", "sampling.temperature": 0.5},
            "has one response",
        ),
        (
            {"rollouts.update": "one_prompt.parquet", "sampling.temperature": 0.5},
            "U has responses to one prompt only, a standard error needs at least two: supply a file",
        ),
        (
            {"rollouts.eval": "one_prompt.parquet", "sampling.temperature": 0.5},
            "E has responses to one prompt only, a standard error needs at least two: supply a file",
        ),
        (
            {
                "rollouts.update": "equal.parquet",
                "sampling.temperature": 0.5,
                "optimizer.rule": "sgd",
            },
            "all 4 groups of U have equal rewards, so that every advantage is 0, and so is v by rule "
            '"sgd": supply',
        ),
        (
            {"rollouts.update": "huge.parquet", "sampling.temperature": 0.5},
            "a reward of U has magnitude 1e+200",
        ),
        ({"rollouts.update": "unscored.parquet"}, "row 0 has no reward"),
        (
            {"rollouts.eval": "padded.parquet", "sampling.temperature": 0.5},
            "row 1 has tokens after its first end-of-sequence token",
        ),
    ):
        # A dry run: nothing has to be sampled for it.
        outcome = command("run", "c.toml", "--dry-run", *sets(checkpoint.settings() | given))
        assert (outcome.status, outcome.out) == (2, "")
        assert said in outcome.err.splitlines()[-1]


@pytest.mark.slow
def test_a_temperature_of_float32_is_what_it_was_rounded_from(probe) -> None:
    sampled = probe("one", sampling__temperature=0.7)
    update = load_rollouts(Path("runs/one/rollouts/update.parquet"), 14, rewards=True)
    rounded = float(torch.tensor(0.7, dtype=torch.float32))
    assert rounded != 0.7
    save_rollouts(update._replace(temperature=rounded), Path("u.parquet"))
    again = probe("two", rollouts__update="u.parquet", sampling__temperature=0.7)
    assert derivative(again) == derivative(sampled)  # E's temperature is the policy's


@pytest.mark.slow
def test_brought_rollouts_are_not_longer_than_a_microbatch(probe, command, checkpoint) -> None:
    probe("one")
    given = {f"rollouts.{x}": f"runs/one/rollouts/{x}.parquet" for x in ("eval", "update")}
    both = [load_rollouts(Path(path), 14, rewards=False) for path in given.values()]
    longest = max(
        len(x) + len(y) for r in both for x, y in zip(r.prompt_ids, r.response_ids, strict=True)
    )
    for most, status in ((longest, 0), (longest - 1, 2)):
        settings = checkpoint.settings() | given | {"run.max_tokens": most}
        outcome = command("run", "c.toml", "--dry-run", *sets(settings))
        assert outcome.status == status, outcome.err
    assert f"may have {longest} tokens, a microbatch {longest - 1}" in outcome.err


class ReducedProducts(TorchDispatchMode):
    """A processor that multiplies float32 in bfloat16 where it may, whatever instructions this one has.

    On one that has them operands are rounded twice, which is once: by shape, and by instruction set,
    oneDNN reduces some products and leaves others.
    """

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (
            func.overloadpacket in self.PRODUCTS
            and torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        ):
            *first, left, right = args
            if left.dtype == torch.float32:
                args = (*first, left.bfloat16().float(), right.bfloat16().float())
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_named_precisions(probe) -> None:
    """Products of bfloat16 leave three digits; what the process was set to comes back."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    settings: dict[str, Any] = {"rollouts__eval": "runs/reference/rollouts/eval.parquet"}
    settings |= {"rollouts__update": "runs/reference/rollouts/update.parquet"}
    reference = probe("reference", policy__precision="reference")
    settings["policy__dtype"] = "float32"
    with ReducedProducts():
        standard = probe("standard", policy__precision="standard", **settings)
        fast = probe("fast", policy__precision="fast", **settings)
    assert standard["conventions"]["dtype"] == "float32"
    # Shares of either sign nearly cancel: rounding is measured by how much they scatter. Of ten other
    # policies the worst was 3e-6 in float32, and with every product in bfloat16 a tenth.
    scatter = reference["first_order"]["se_given_U"]["value"]
    assert abs(derivative(standard) - derivative(reference)) < 1e-4 * scatter
    assert abs(derivative(fast) - derivative(reference)) < 0.3 * scatter
    assert abs(derivative(fast) - derivative(standard)) > 1e-4 * scatter  # it is on in the passes
    assert fast["conventions"]["precision"] == "fast"
    assert fast["second_order"] is None or fast["second_order"].get("value") is None
    assert torch.backends.mkldnn.matmul.fp32_precision == before
