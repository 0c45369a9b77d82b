"""The orchestration: load, sample, predict, measure, check, write. The only file that does it all."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import funcprobe
from funcprobe import checks, estimators, tree
from funcprobe.layout import microbatches, response_mask, select
from funcprobe.objective import PRESETS, Objective, advantages, coefficients, equal_reward_groups
from funcprobe.policy import Forward
from funcprobe.types import (
    AdamGroup,
    AdamState,
    Batch,
    Entropy,
    InputError,
    Step,
    TokenStats,
    UpdateBatch,
)

from . import results, rollouts, store
from .config import Config, to_toml
from .console import Narrator
from .devices import resolve_device
from .model import Policy, load_policy
from .optimizer import AdamOverrides, OptimizerReport, find_optimizer_file, read_adam_state
from .prompts import Prompt, draw_distinct, draw_with_replacement, encode_prompts, load_prompts
from .rewards import load_reward
from .rollouts import Rollouts
from .sampling import sample_responses
from .store import Stages
from .toy import ensure_toy

LEAVES = torch.zeros(0)  # stands for a tensor where only the shape of a tree is meant


class Plan(NamedTuple):
    """Everything that is known before a token is sampled."""

    config: Config  # "toy" replaced by its paths
    policy: Policy
    adam_state: AdamState
    optimizer: OptimizerReport | None
    step: Step
    objective: Objective
    entropy: Entropy
    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    etas: tuple[float, ...]  # ascending, the next step's lr among them
    next_lr: float
    inputs: dict[str, Any]  # hashes of the files the numbers depend on


class Batches(NamedTuple):
    """E and U as they are stored and as the core takes them."""

    eval_rollouts: Rollouts
    update_rollouts: Rollouts
    eval_batch: Batch
    update: UpdateBatch
    sampler_logp_NR: torch.Tensor | None
    equal_groups: int


def run(config: Config, narrator: Narrator, *, fresh: bool = False) -> tuple[dict[str, Any], Path]:
    """The whole probe; returns results.json's content and the run folder, which is whole or absent."""
    folder = Path(config.run.folder) / config.run.name
    store.require_writable(folder)
    plan = load(config, narrator)
    stages = Stages(Path(config.run.folder) / ".stages", fresh)
    versions = _versions(plan.policy.model)
    batches = sample(plan, stages, narrator)
    # Probed with the distribution that was sampled, also where rollouts bring their own.
    forward = _forward(plan, batches)
    passes = _passes(plan, batches, forward, stages, narrator)
    prediction = funcprobe.summarise(
        plan.policy.params,
        passes,
        batches.eval_batch,
        batches.update,
        plan.adam_state,
        entropy=plan.entropy,
        step=plan.step,
        sampler_logp_NR=batches.sampler_logp_NR,
    )
    sweep = _sweep(plan, batches, prediction, forward, stages, narrator)
    seen = check(plan, batches, prediction, forward, narrator)
    seen.append(_untouched(versions, plan.policy.model))
    document = results.document(plan, batches, prediction, sweep, seen, narrator.seconds)
    with store.run_folder(folder) as target:
        (target / "config.toml").write_text(to_toml(plan.config), encoding="utf-8")
        (target / "rollouts").mkdir()
        rollouts.save_rollouts(batches.eval_rollouts, target / "rollouts" / "eval.parquet")
        rollouts.save_rollouts(batches.update_rollouts, target / "rollouts" / "update.parquet")
        store.save_params(prediction.direction.total, target / "direction.safetensors")
        store.write_json(document, target / "results.json")
        store.write_json(results.manifest(plan), target / "manifest.json")
        (target / "run.log").write_text("\n".join(narrator.lines) + "\n", encoding="utf-8")
    return document, folder


def load(config: Config, narrator: Narrator) -> Plan:
    """Policy, optimizer state and prompts; everything that can be refused without sampling is."""
    if "toy" in {config.policy.checkpoint, config.prompts.source}:
        with narrator.phase("make the toy policy (once)"):
            toy = ensure_toy(report=narrator.say)
        config = _with_toy(config, str(toy.checkpoint), str(toy.prompts))
    load_reward(config.reward.function, answer_column=config.reward.answer_column)
    device = resolve_device(config.run.device)
    with narrator.phase("load"):
        policy = load_policy(config.policy, device)
        adam_state, report, step = _optimizer(config, policy)
        prompts, prompt_ids = _prompts(config, policy)
    for line in (*policy.lines, *_optimizer_lines(report, step)):
        narrator.say(line)
    if config.policy.dtype in {"bfloat16", "float16"}:
        narrator.say(f"warning: in {config.policy.dtype} measured differences drown in rounding")
    first = next((group.lr for group in adam_state.groups if group.names), 0.0)
    next_lr = config.optimizer.lr or first
    etas = {*config.measure.etas, *([next_lr] if config.measure.next_lr and next_lr > 0 else [])}
    checkpoint = Path(config.policy.checkpoint).expanduser()
    inputs = {
        "base": store.fingerprint_path(Path(policy.base))
        if Path(policy.base).is_dir()
        else policy.base,
        "adapter": store.fingerprint(policy.params),
        "checkpoint": store.fingerprint_path(checkpoint) if checkpoint.is_dir() else str(checkpoint),
        "optimizer": store.fingerprint_path(report.path) if report else {},
        "prompts": store.fingerprint([prompt_ids, [prompt.row for prompt in prompts]]),
    }
    return Plan(
        config=config,
        policy=policy,
        adam_state=adam_state,
        optimizer=report,
        step=step,
        objective=_objective(config),
        entropy=Entropy(**config.entropy.model_dump()),
        prompts=prompts,
        prompt_ids=prompt_ids,
        etas=tuple(sorted(etas)),
        next_lr=next_lr,
        inputs=inputs,
    )


def sample(plan: Plan, stages: Stages, narrator: Narrator) -> Batches:
    """E and U: sampled from the policy, taken from an earlier run's stage, or brought."""
    sampling, brought = plan.config.sampling, plan.config.rollouts
    count = len(plan.prompts)
    seeds = {purpose: _seed(plan.config.run.seed, purpose) for purpose in ("E", "U")}
    if brought.eval is None:
        index = draw_with_replacement(sampling.B_E, count, seeds["E"])
        eval_rollouts = _sampled(plan, "E", index, seeds["E"], stages, narrator)
    else:
        eval_rollouts = _brought(plan, brought.eval, rewards=False)
    if brought.update is None:
        distinct = draw_distinct(sampling.B_U, count, seeds["U"])
        index = [i for i in distinct for _ in range(sampling.G)]
        update_rollouts = _sampled(plan, "U", index, seeds["U"], stages, narrator)
        with narrator.phase("rewards of U"):
            update_rollouts = update_rollouts._replace(reward=_rewards(plan, update_rollouts))
    else:
        update_rollouts = _brought(plan, brought.update, rewards=True)
    if eval_rollouts.temperature != update_rollouts.temperature:
        raise InputError(
            f"E has temperature {eval_rollouts.temperature:g} and U {update_rollouts.temperature:g}: "
            "both must be samples of one policy"
        )
    eval_batch = rollouts.to_batch(eval_rollouts)
    update_batch = rollouts.to_batch(update_rollouts)
    reward_N = torch.tensor(update_rollouts.reward, dtype=torch.float64)
    equal = equal_reward_groups(reward_N, update_batch.prompt_N)
    groups = len(update_batch.prompt_N.unique())
    if equal == groups:
        raise InputError(
            f"all {groups} groups of U have equal rewards, so every advantage is 0 and v has no "
            "gradient part: take other prompts or rewards, or raise sampling.G"
        )
    advantage_N = advantages(reward_N, update_batch.prompt_N, plan.objective.advantage)
    coef_NR = coefficients(
        advantage_N,
        update_batch.response_length_N,
        update_batch.prompt_N,
        plan.objective.normalisation,
        plan.objective.constant,
    )
    narrator.say(
        f"E: {len(eval_batch.prompt_N)} responses to {len(eval_batch.prompt_N.unique())} prompts; "
        f"U: {len(reward_N)} responses to {groups} prompts, mean reward {float(reward_N.mean()):.3f}, "
        f"{equal} groups of equal rewards (no gradient from these)"
    )
    return Batches(
        eval_rollouts=eval_rollouts,
        update_rollouts=update_rollouts._replace(advantage=advantage_N.tolist()),
        eval_batch=eval_batch,
        update=UpdateBatch(update_batch, coef_NR),
        sampler_logp_NR=rollouts.sampler_logp(eval_rollouts, eval_batch),
        equal_groups=equal,
    )


def check(
    plan: Plan,
    batches: Batches,
    prediction: funcprobe.Prediction,
    forward: Forward,
    narrator: Narrator,
) -> list[checks.Check]:
    """The sanity checks of G3, on the run's batches (the slow ones on 32 sequences of E)."""
    params, max_tokens = plan.policy.params, plan.config.run.max_tokens
    few = torch.arange(min(32, len(batches.eval_batch.prompt_N)))
    part = select(batches.eval_batch, few)
    few_logp_NR = None if batches.sampler_logp_NR is None else batches.sampler_logp_NR[few]
    if few_logp_NR is not None:
        few_logp_NR = few_logp_NR[:, : response_mask(part).shape[1]]
    v = prediction.direction.total
    with narrator.phase("sanity checks"):
        stats = funcprobe.token_stats(params, part, forward, max_tokens)
        return [
            checks.adapter_changes_logits(params, part, stats, forward, max_tokens),
            checks.gradients_reach("X", prediction.X),
            checks.gradients_reach("Y", prediction.Y),
            checks.routes_agree(prediction),
            checks.alpha_cases(params, part, v, forward, max_tokens),
            checks.identity_against_adam(prediction),
            checks.eta_zero(
                params,
                part,
                v,
                stats,
                forward,
                entropy=plan.entropy,
                max_tokens=max_tokens,
                sampler_logp_NR=few_logp_NR,
            ),
            checks.repeat_is_identical(params, part, stats, forward, max_tokens),
        ]


def check_alone(config: Config, narrator: Narrator) -> list[checks.Check]:
    """The sanity checks on small batches of their own; nothing is written."""
    small = {"B_E": min(config.sampling.B_E, 32), "B_U": min(config.sampling.B_U, 8)}
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update=small)})
    plan = load(config, narrator)
    versions = _versions(plan.policy.model)
    batches = sample(plan, Stages(None), narrator)
    forward = _forward(plan, batches)
    prediction = funcprobe.summarise(
        plan.policy.params,
        _passes(plan, batches, forward, Stages(None), narrator),
        batches.eval_batch,
        batches.update,
        plan.adam_state,
        entropy=plan.entropy,
        step=plan.step,
        sampler_logp_NR=batches.sampler_logp_NR,
    )
    seen = check(plan, batches, prediction, forward, narrator)
    return [*seen, _untouched(versions, plan.policy.model)]


def _with_toy(config: Config, checkpoint: str, prompts: str) -> Config:
    if config.policy.checkpoint == "toy":
        policy = config.policy.model_copy(update={"checkpoint": checkpoint})
        config = config.model_copy(update={"policy": policy})
    if config.prompts.source == "toy":
        source = config.prompts.model_copy(update={"source": prompts})
        config = config.model_copy(update={"prompts": source})
    return config


def _optimizer(config: Config, policy: Policy) -> tuple[AdamState, OptimizerReport | None, Step]:
    chosen = config.optimizer
    step = Step(chosen.rule, chosen.max_grad_norm or None, chosen.max_scale or None)
    if chosen.rule == "sgd":
        group = AdamGroup(tuple(policy.params), chosen.lr or 0.0, 0.9, 0.999, 1e-8, 0.0)
        return AdamState({}, {}, {}, (group,)), None, step
    path = Path(chosen.state).expanduser() if chosen.state else None
    path = path or find_optimizer_file(Path(config.policy.checkpoint).expanduser())
    beta1, beta2 = chosen.betas or (None, None)
    adam_state, report = read_adam_state(
        path,
        policy.model,
        policy.params,
        overrides=AdamOverrides(
            chosen.lr, beta1, beta2, chosen.eps, chosen.weight_decay, chosen.checkpoint_step
        ),
        min_coverage=chosen.min_coverage,
        allow_low_coverage=chosen.on_low_coverage == "identity",
    )
    covered = min(report.coverage["exp_avg"], report.coverage["exp_avg_sq"])
    if covered < chosen.min_coverage * report.parameters:
        step = step._replace(rule="sgd")
    return adam_state, report, step


def _optimizer_lines(report: OptimizerReport | None, step: Step) -> list[str]:
    if report is None:
        return ['optimizer: rule "sgd", no state is read']
    covered = ", ".join(f"{what} {count}" for what, count in report.coverage.items())
    lines = [
        f"optimizer {report.path.name}: {report.format}, names {report.route}; of {report.parameters} "
        f"parameters have {covered}",
        *report.notes,
    ]
    if step.rule == "sgd":
        lines.append("warning: coverage is low and on_low_coverage is identity: v is the raw gradient")
    return lines


def _prompts(config: Config, policy: Policy) -> tuple[list[Prompt], list[list[int]]]:
    chosen = config.prompts
    prompts = load_prompts(
        chosen.source,
        prompt_column=chosen.prompt_column,
        split=chosen.split,
        template=chosen.template,
        chat=chosen.chat,
        system_prompt=chosen.system_prompt,
        tokenizer=policy.tokenizer,
    )
    if config.rollouts.update is None and len(prompts) < config.sampling.B_U:
        raise InputError(
            f"{chosen.source} has {len(prompts)} prompts, sampling.B_U = {config.sampling.B_U} "
            "distinct ones are asked for: lower B_U or give more prompts"
        )
    ids = encode_prompts(
        prompts, policy.tokenizer, chat=chosen.chat, max_prompt_tokens=chosen.max_prompt_tokens
    )
    return prompts, ids


def _objective(config: Config) -> Objective:
    chosen, preset = config.objective, PRESETS[config.objective.preset]
    return Objective(
        chosen.advantage or preset.advantage,
        chosen.normalisation or preset.normalisation,
        chosen.constant or float(config.sampling.max_new_tokens),
    )


def _sampled(
    plan: Plan, name: str, index: list[int], seed: int, stages: Stages, narrator: Narrator
) -> Rollouts:
    policy = plan.policy

    def generate(path: Path) -> None:
        ids = [plan.prompt_ids[i] for i in index]
        with narrator.phase(f"sample {name}", len(ids)) as advance:
            found = sample_responses(policy, ids, plan.config.sampling, seed, advance)
        drawn = Rollouts(
            prompt_index=index,
            prompt=[plan.prompts[i].text for i in index],
            response=[policy.tokenizer.decode(y, skip_special_tokens=True) for y in found.ids],
            prompt_ids=ids,
            response_ids=found.ids,
            finish_reason=["stop" if done else "length" for done in found.finished],
            temperature=plan.config.sampling.temperature,
        )
        rollouts.save_rollouts(drawn, path)

    inputs = {
        **{key: plan.inputs[key] for key in ("base", "adapter", "prompts")},
        "policy": plan.config.policy.model_dump(),
        "sampling": plan.config.sampling.model_dump(),
        "index": index,
        "seed": seed,
    }
    with stages.file(f"rollouts-{name}", inputs, "parquet", generate) as path:
        return rollouts.load_rollouts(path, _vocabulary(policy), rewards=False)


def _brought(plan: Plan, path: str, *, rewards: bool) -> Rollouts:
    return rollouts.load_rollouts(Path(path).expanduser(), _vocabulary(plan.policy), rewards=rewards)


def _vocabulary(policy: Policy) -> int:
    return int(policy.model.get_input_embeddings().weight.shape[0])


def _rewards(plan: Plan, drawn: Rollouts) -> list[float]:
    reward = load_reward(plan.config.reward.function, answer_column=plan.config.reward.answer_column)
    rows = [plan.prompts[i].row for i in drawn.prompt_index]
    values: list[float] = reward(drawn.prompt, drawn.response, drawn.response_ids, rows).tolist()
    return values


def _forward(plan: Plan, batches: Batches) -> Forward:
    return funcprobe.bind(
        plan.policy.model,
        temperature=batches.eval_rollouts.temperature,
        entropy=plan.entropy,
        max_tokens=plan.config.run.max_tokens,
    ).forward


def _passes(
    plan: Plan, batches: Batches, forward: Forward, stages: Stages, narrator: Narrator
) -> funcprobe.Passes:
    params, max_tokens = plan.policy.params, plan.config.run.max_tokens
    leaves = dict.fromkeys(params, LEAVES)
    like = funcprobe.Passes(
        leaves,
        TokenStats(LEAVES, LEAVES),
        TokenStats(LEAVES, LEAVES),
        leaves,
        TokenStats(LEAVES, LEAVES),
    )
    inputs = {
        **_state_inputs(plan, batches),
        "coef": batches.update.coef_NR,
        "update": batches.update.batch,
        "optimizer": [plan.adam_state.exp_avg, plan.adam_state.exp_avg_sq, plan.adam_state.step],
        "groups": plan.adam_state.groups,
        "step": plan.step,
        "entropy": plan.entropy,
    }

    def compute() -> funcprobe.Passes:
        rows = 3 * len(microbatches(batches.eval_batch, max_tokens))
        rows += 2 * len(microbatches(batches.update.batch, max_tokens))
        with narrator.phase("first order", rows) as advance:
            return funcprobe.first_order_passes(
                params,
                batches.eval_batch,
                batches.update,
                plan.adam_state,
                _counted(forward, advance),
                entropy=plan.entropy,
                step=plan.step,
                max_tokens=max_tokens,
                sampler_logp_NR=batches.sampler_logp_NR,
            )

    passes: funcprobe.Passes = stages.tensors("first-order", inputs, like, compute)
    return passes


def _sweep(
    plan: Plan,
    batches: Batches,
    prediction: funcprobe.Prediction,
    forward: Forward,
    stages: Stages,
    narrator: Narrator,
) -> results.Sweep:
    """Measured changes at every eta, and at minus the three smallest, which show the rounding."""
    params, v = plan.policy.params, prediction.direction.total
    mirrored = plan.etas[:3] if len(plan.etas) >= 3 else ()
    log_ratio_NR = None
    if batches.sampler_logp_NR is not None:
        log_ratio_NR = prediction.stats.logp_NR - batches.sampler_logp_NR
    parts = len(microbatches(batches.eval_batch, plan.config.run.max_tokens))
    inputs = {**_state_inputs(plan, batches), "direction": v}
    with narrator.phase("measure", parts * (len(plan.etas) + len(mirrored))) as advance:

        def measured(eta: float) -> estimators.Measured:
            moved = stages.tensors(
                "moved",
                {**inputs, "eta": eta},
                TokenStats(LEAVES, LEAVES),
                lambda: funcprobe.token_stats(
                    tree.axpy(eta, v, params),
                    batches.eval_batch,
                    _counted(forward, advance),
                    plan.config.run.max_tokens,
                ),
            )
            return estimators.measured_change(
                prediction.stats,
                moved,
                response_mask(batches.eval_batch),
                plan.entropy,
                log_ratio_NR,
            )

        plus = [measured(eta) for eta in plan.etas]
        minus = [measured(-eta) for eta in mirrored]
    noise = None
    if mirrored:
        noise = estimators.rounding_noise(
            mirrored, [m.delta for m in plus[: len(mirrored)]], [m.delta for m in minus]
        )
    return results.Sweep(plan.etas, tuple(plus), noise)


def _state_inputs(plan: Plan, batches: Batches) -> dict[str, Any]:
    return {
        "base": plan.inputs["base"],
        "params": plan.policy.params,
        "policy": plan.config.policy.model_dump(),
        "device": str(resolve_device(plan.config.run.device)),
        "max_tokens": plan.config.run.max_tokens,
        "eval": batches.eval_batch,
        "temperature": batches.eval_rollouts.temperature,
        "sampler_logp": batches.sampler_logp_NR,
        "funcprobe": results.versions(),
    }


def _counted(forward: Forward, advance: Callable[[int], None]) -> Forward:
    """The same forward, telling the progress bar of every microbatch."""

    def hidden(*args: Any, **kwargs: Any) -> torch.Tensor:
        advance(1)
        return forward.hidden(*args, **kwargs)

    return forward._replace(hidden=hidden)


def _seed(seed: int, purpose: str) -> int:
    """Independent seeds of E and U from one: neighbouring run seeds share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:6])


def _versions(model: torch.nn.Module) -> dict[str, int]:
    """PyTorch counts the in-place changes of every tensor."""
    return {n: t._version for n, t in (*model.named_parameters(), *model.named_buffers())}


def _untouched(before: dict[str, int], model: torch.nn.Module) -> checks.Check:
    after = _versions(model)
    changed = sum(before[n] != after.get(n) for n in before)
    return checks.Check(
        "the model's weights are untouched",
        changed == 0 and before.keys() == after.keys(),
        f"{changed} of {len(before)} parameters and buffers written to",
        "0",
        "a module that writes to its own buffers in the forward",
    )
