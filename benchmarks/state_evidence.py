"""How often a gradient confirms, contradicts or leaves open the order of an optimizer's state.

    python benchmarks/state_evidence.py [--real FOLDER] [--prompts 64] [--shuffles 1000]

States: the toy's or, with --real, that of checkpoint-8 of `real_policy.py`; as saved; with moments and
gradients rounded to bfloat16; and with moments in 8 bits, quantised as bitsandbytes does (dynamic map,
blocks of 256). Gradients: sums over groups of 8 responses drawn from the policy; U takes some of the
groups. "few": of 64 groups only three have rewards that differ. Orders: the true one; twelve kinds of
others, of which those that put a shape where another is expected are refused before any gradient;
"misfiled": the true one but for `MISFILED` parameters of one shape in a cycle, which is none of the
usual ones; and shuffles of the parameters of each shape. A figure counts verdicts over `DRAWS` draws of
U, for "misfiled" four times each, or over as many shuffles as asked for, each with one of the draws.
"""

import argparse
import collections
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import create_dynamic_map

import funcprobe
from funcprobe.adapters.checkpoint.model import Policy, load_policy
from funcprobe.adapters.checkpoint.toy import ensure_toy
from funcprobe.adapters.config.schema import PolicyConfig, SamplingConfig
from funcprobe.adapters.optimizer import find_state, read_adam_state
from funcprobe.adapters.sampling.generate import sample_responses
from funcprobe.adapters.sampling.rewards import load_reward
from funcprobe.step.evidence import Alike, compare, judge
from funcprobe.step.orders import Pairing, other_orders
from funcprobe.types import AdamState, Params

G, DRAWS, MISFILED = 8, 8, 4
SIZES = {"8": 1, "32": 4, "128": 16, "512": 64}  # responses of U -> groups
KINDS = (
    "the names sorted as text",
    "the layers in the order of their numbers as text",
    "the layers reversed",
    "the layers shifted by one",
    "the modules of a layer in alphabetical order",
    "the modules of a layer reversed",
    "module by module over all layers",
    "lora_B before lora_A",
    "all lora_A before all lora_B",
    "q_proj and o_proj exchanged",
    "k_proj and v_proj exchanged",
    "two layers exchanged",
)


class Group(NamedTuple):
    """sum_ik A_i l_ik' of a group, without normalisation; None if its rewards are equal."""

    Y: Params | None
    tokens: int


class Study(NamedTuple):
    name: str
    state: AdamState
    groups: list[Group]


def toy(prompts: int) -> Study:
    made = ensure_toy()
    rows = [json.loads(line) for line in made.prompts.read_text().splitlines()]
    policy = load_policy(PolicyConfig(checkpoint=str(made.checkpoint)), torch.device("cpu"))
    score = load_reward("numeric")

    def rewards(row: dict[str, Any], texts: list[str], ids: list[list[int]]) -> list[float]:
        return [float(r) for r in score([row["prompt"]] * G, texts, ids, [row] * G)]

    return _study("toy", made.checkpoint, policy, rows, prompts, rewards)


def real(folder: Path, prompts: int) -> Study:
    import pyarrow.parquet

    checkpoint = folder / "run" / "with_names" / "checkpoint-8"
    policy = load_policy(PolicyConfig(checkpoint=str(checkpoint)), torch.device("cpu"))
    rows = pyarrow.parquet.read_table(folder / "run" / "prompts.parquet").to_pylist()
    spec = importlib.util.spec_from_file_location("reward", folder / "run" / "reward.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def rewards(row: dict[str, Any], texts: list[str], _: list[list[int]]) -> list[float]:
        found: list[float] = module.closeness(texts, answer=[row["answer"]] * G)
        return found

    return _study("real", checkpoint, policy, rows, prompts, rewards)


def _study(
    name: str,
    checkpoint: Path,
    policy: Policy,
    rows: list[dict[str, Any]],
    prompts: int,
    rewards: Callable[..., list[float]],
) -> Study:
    probe = funcprobe.bind(policy.model)
    state, _ = read_adam_state(find_state(checkpoint), policy.model, probe.params)
    groups = []
    for number, row in enumerate(random.Random(0).sample(rows, prompts)):
        prompt = row["prompt"]
        if isinstance(prompt, str):
            x = policy.tokenizer(prompt)["input_ids"]
        else:
            x = policy.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        found = sample_responses(policy, [x] * G, SamplingConfig(max_new_tokens=16), number)
        texts = policy.tokenizer.batch_decode(found.ids, skip_special_tokens=True)
        batch = funcprobe.collate([x] * G, found.ids, [0] * G)
        r_N = torch.tensor(rewards(row, texts, found.ids), dtype=torch.float64)
        advantage_N = funcprobe.advantages(r_N, batch.prompt_N, "mean_std")
        tokens, Y = int(batch.response_length_N.sum()), None
        if bool(advantage_N.any()):
            coef_NR = funcprobe.coefficients(
                advantage_N, batch.response_length_N, batch.prompt_N, "token_mean"
            )
            Y = probe.grad_Y(probe.params, funcprobe.UpdateBatch(batch, tokens * coef_NR))
        groups.append(Group(Y, tokens))
    return Study(name, state, groups)


def gradient(groups: list[Group]) -> Params | None:
    """Y of U = these groups, dapo's token mean."""
    with_gradient = [group.Y for group in groups if group.Y is not None]
    if not with_gradient:
        return None
    tokens = sum(group.tokens for group in groups)
    return {n: torch.stack([Y[n] for Y in with_gradient]).sum(0) / tokens for n in with_gradient[0]}


def in_bfloat16(Y: Params, state: AdamState) -> tuple[Params, AdamState]:
    def rounded(params: Params) -> Params:
        return {name: tensor.bfloat16().float() for name, tensor in params.items()}

    return rounded(Y), state._replace(exp_avg_sq=rounded(state.exp_avg_sq))


def in_8_bits(Y: Params, state: AdamState) -> tuple[Params, AdamState]:
    code = create_dynamic_map(signed=False).double().sort().values
    edges = (code[1:] + code[:-1]) / 2

    def quantised(nu: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(nu.double().flatten(), (0, -nu.numel() % 256)).view(-1, 256)
        largest = padded.amax(1, keepdim=True).clamp(min=1e-300)
        flat = (code[torch.bucketize(padded / largest, edges)] * largest).flatten()
        return flat[: nu.numel()].view(nu.shape).float()

    return Y, state._replace(exp_avg_sq={n: quantised(nu) for n, nu in state.exp_avg_sq.items()})


STORED: dict[str, Callable[[Params, AdamState], tuple[Params, AdamState]]] = {
    "as saved": lambda Y, state: (Y, state),
    "bfloat16": in_bfloat16,
    "8 bits": in_8_bits,
}


def filed(classes: list[Alike], pairing: Pairing) -> list[Alike]:
    """The comparison if the second moment of i were under the name pairing[i]."""
    moved = []
    for one in classes:
        position = {name: j for j, name in enumerate(one.names)}
        column = [0] * len(one.names)
        for j, name in enumerate(one.names):
            column[position[pairing[name]]] = j
        per_entry_MM, log_p_TMM = one.per_entry_MM[:, column], one.log_p_TMM[:, :, column]
        moved.append(Alike(one.names, per_entry_MM, log_p_TMM))
    return moved


def shuffled(classes: list[Alike], rng: random.Random) -> Pairing:
    pairing: Pairing = {}
    for one in classes:
        other = rng.sample(one.names, len(one.names))
        pairing |= dict(zip(one.names, other, strict=True))
    return pairing


def misfiled(classes: list[Alike], rng: random.Random) -> Pairing:
    pairing = {name: name for one in classes for name in one.names}
    largest = max(classes, key=lambda one: len(one.names))
    chosen = rng.sample(largest.names, MISFILED)
    return pairing | dict(zip(chosen, [*chosen[1:], chosen[0]], strict=True))


def draws(study: Study, size: str, rng: random.Random) -> list[Params]:
    found: list[Params] = []
    while len(found) < DRAWS:
        if size == "few":
            with_gradient = [g for g in study.groups if g.Y is not None]
            rest = sum(g.tokens for g in study.groups) - sum(g.tokens for g in with_gradient[:3])
            groups = [*rng.sample(with_gradient, 3), Group(None, rest)]
        else:
            groups = rng.sample(study.groups, min(SIZES[size], len(study.groups)))
        Y = gradient(groups)
        if Y is not None:
            found.append(Y)
        if len(groups) == len(study.groups):
            break  # they are all there are
    return found


def counts(verdicts: list[str]) -> str:
    found = collections.Counter(verdicts)
    return " / ".join(str(found[v]) for v in ("confirmed", "contradicted", "undecided"))


def rows_of(study: Study, shuffles: int) -> None:
    shapes = {name: tuple(nu.shape) for name, nu in study.state.exp_avg_sq.items()}
    others = other_orders([group.names for group in study.state.groups], shapes)
    layers = [what for what in others if what.startswith("layers ")]
    alike = collections.Counter(shapes.values())
    total = sum(count for count in alike.values() if count > 1)
    for how, stored in STORED.items():
        for size in (*SIZES, "few"):
            rng = random.Random(1)
            seen = [compare(*stored(Y, study.state)) for Y in draws(study, size, rng)]
            own = [judge(classes, others, total) for classes in seen]
            home = sorted(found.home for found in own)
            kinds: list[str] = []
            unnamed = 0
            for classes in seen:
                for kind in KINDS:
                    what = rng.choice(layers) if kind == "two layers exchanged" and layers else kind
                    if what not in others:
                        continue  # refused by shapes
                    found = judge(filed(classes, others[what]), others, total)
                    kinds.append(found.verdict)
                    unnamed += found.verdict == "contradicted" and found.likeliest != what
            few = [
                judge(filed(classes, misfiled(classes, rng)), others, total).verdict
                for classes in seen
                for _ in range(4)
            ]
            verdicts = []
            for i in range(shuffles):
                moved = filed(seen[i % len(seen)], shuffled(seen[i % len(seen)], rng))
                # Without other orders to exceed it is confirmed more easily, and several times faster.
                verdict = judge(moved, {}, total).verdict
                if verdict == "confirmed":
                    verdict = judge(moved, others, total).verdict
                verdicts.append(verdict)
            print(
                f"| {study.name} | {how} | {size} | {home[0]} to {home[-1]} of {total} | "
                f"{counts([found.verdict for found in own])} | {counts(kinds)} | {unnamed} | "
                f"{counts(few)} | {counts(verdicts)} |",
                flush=True,
            )
    refused = [kind for kind in KINDS if kind not in others and kind != "two layers exchanged"]
    print(f"\n{study.name}: refused by shapes: {', '.join(refused) or 'none'}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, help="folder of real_policy.py")
    parser.add_argument("--prompts", type=int, default=64, help="groups of 8 responses to sample")
    parser.add_argument("--shuffles", type=int, default=1000)
    args = parser.parse_args()
    print(
        "| policy | stored | U | at home | true order | other kinds | misnamed | misfiled | shuffles |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    study = toy(args.prompts) if args.real is None else real(args.real, args.prompts)
    rows_of(study, args.shuffles)


if __name__ == "__main__":
    main()
