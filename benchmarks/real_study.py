"""What a probe of the real policy predicts, against what TRL's own next step did to it.

    python benchmarks/real_study.py [--step 8] [--each 5] [--B-E 128] [--folder FOLDER]

The step is that of the recorded rollouts, from checkpoint-8 to checkpoint-9. Four comparisons: the
direction with the difference of the two adapters; measured with predicted at three learning rates; the
predicted change with that of fresh responses, sampled from both checkpoints by transformers alone; and
what each stage took. The policy is made first if it is missing (benchmarks/real_policy.py).
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
import torch
from real_policy import FOLDER, MAX_NEW_TOKENS, Real, ensure_real
from real_reward import closeness
from safetensors.torch import load_file
from torch import Tensor

from funcprobe.adapters import run
from funcprobe.adapters.config.file import read_config
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.results import Results

CONFIG = Path(__file__).parents[1] / "configs" / "smollm2.toml"
PROMPTS_AT_ONCE = 20


class Fresh(NamedTuple):
    """Responses of one checkpoint: `each` to every prompt, one after the other."""

    entropy_N: Tensor  # sum over the response's tokens, nats
    length_N: Tensor  # tokens, the first EOS included
    reward_N: Tensor

    @property
    def per_token(self) -> float:
        return float(self.entropy_N.sum() / self.length_N.sum())

    @property
    def influence_N(self) -> Tensor:
        """Of each response on the ratio of the sums; their mean is 0."""
        return (self.entropy_N - self.per_token * self.length_N) / self.length_N.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--step", type=int, default=8, help="checkpoint-N; N + 1 must be there")
    parser.add_argument("--each", type=int, default=5, help="fresh responses to each of 400 prompts")
    parser.add_argument("--B-E", type=int, default=128)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--run", type=Path, default=Path("runs"), help="folder of the run")
    args = parser.parse_args()
    real = ensure_real(args.folder, lambda line: print(line, flush=True))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    results, folder = probe(real, args.step, args.B_E, args.run)
    print_sweep(results)
    print_step(real, args.step, results, folder)
    print_cost(results)
    pair = [sample(real, args.step + i, args.each) for i in (0, 1)]
    print_fresh(pair, args.each, results)


def probe(real: Real, step: int, B_E: int, parent: Path) -> tuple[Results, Path]:
    """A run of configs/smollm2.toml with the step's recorded rollouts as U."""
    settings = [
        f"policy.checkpoint={real.checkpoint(step)}",
        f"prompts.source={real.prompts}",
        f"reward.function={real.reward}",
        f"rollouts.update={real.rollouts(step + 1)}",
        f"sampling.B_E={B_E}",
        "measure.second_order=none",
        f"run.folder={parent}",
        f"run.name=smollm2-step-{step + 1}",
    ]
    return run.run(read_config(CONFIG, settings), Narrator())


def sample(real: Real, step: int, each: int) -> Fresh:
    """`each` responses to every prompt, by transformers and peft, at temperature 1.

    The seed of a batch is the same for every checkpoint. torch's multinomial then divides other
    probabilities by the same exponential numbers, so that two checkpoints draw the same token wherever
    they nearly agree: each alone is sampled exactly, and the difference of two has a smaller variance.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer, DynamicCache

    start = time.perf_counter()
    checkpoint = real.checkpoint(step)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = AutoPeftModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rows = pyarrow.parquet.read_table(real.prompts).to_pylist()
    entropies, lengths, rewards = [], [], []
    for at in range(0, len(rows), PROMPTS_AT_ONCE):
        asked = rows[at : at + PROMPTS_AT_ONCE]
        inputs = tokenizer.apply_chat_template(
            [row["prompt"] for row in asked],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        cache = DynamicCache(config=model.config)
        with torch.no_grad():  # a prompt once, not once a response
            mask = inputs["attention_mask"]
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
            model(
                input_ids=inputs["input_ids"][:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=position,
                past_key_values=cache,
                logits_to_keep=1,
            )
        cache.batch_repeat_interleave(each)
        torch.manual_seed(at)
        options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        found = model.generate(
            **{key: value.repeat_interleave(each, 0) for key, value in inputs.items()},
            **options,
            past_key_values=cache,
            max_new_tokens=MAX_NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        response_NR = found.sequences[:, inputs["input_ids"].shape[1] :]
        eos_NR = (response_NR == tokenizer.eos_token_id).long()
        mask_NR = (eos_NR.cumsum(1) - eos_NR) == 0
        logp = [logits.double().log_softmax(-1) for logits in found.logits]
        entropy_NR = torch.stack([-(each.exp() * each).sum(-1) for each in logp], dim=1)
        entropies.append((entropy_NR * mask_NR).sum(1))
        lengths.append(mask_NR.sum(1).double())
        texts = tokenizer.batch_decode(response_NR, skip_special_tokens=True)
        rewards += closeness(texts, [row["answer"] for row in asked for _ in range(each)])
    fresh = Fresh(torch.cat(entropies), torch.cat(lengths), torch.tensor(rewards, dtype=torch.float64))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    reward, se = fresh.reward_N.mean(), fresh.reward_N.std() / len(fresh.reward_N) ** 0.5
    print(
        f"checkpoint-{step}: {len(fresh.length_N)} fresh responses, {fresh.per_token:.4f} nats per "
        f"token, {fresh.length_N.mean():.2f} tokens each, reward {reward:.3f} +- {se:.3f}; "
        f"{time.perf_counter() - start:.0f} s, peak of the process so far {peak:.1f} GiB",
        flush=True,
    )
    return fresh


def print_sweep(results: Results) -> None:
    print("\n| eta | predicted | +- given U | measured | ratio | within 1 % |")
    print("|---|---|---|---|---|---|")
    for row in results.sweep:
        print(
            f"| {row.eta:.2g}{' (next lr)' if row.is_next_lr else ''} | {row.predicted.value:.4e} "
            f"| {row.se_given_U.value:.1e} | {row.measured.value:.4e} | {row.ratio.value:.5f} "
            f"| {'yes' if abs(row.ratio.value - 1) < 0.01 else '**missed**'} |"
        )
    print(f"entropy of E: {results.entropy.value:.4f} nats per token", flush=True)


def print_step(real: Real, step: int, results: Results, folder: Path) -> None:
    v = load_file(folder / "direction.safetensors")
    error = step_errors(real, step, results.next_lr.value, v)
    worst = max(error, key=error.__getitem__)
    print(
        f"\nThe step that TRL took, {len(error)} tensors: largest relative error {error[worst]:.1e} "
        f"({worst}), median {sorted(error.values())[len(error) // 2]:.1e}; bound 1e-3",
        flush=True,
    )


def step_errors(real: Real, step: int, lr: float, v: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor of v: |v - taken| / |taken|, taken = (theta of N + 1 - theta of N) / lr."""
    before, after = (
        {
            name.replace(".weight", ".default.weight"): tensor.double()
            for name, tensor in load_file(
                real.checkpoint(step + i) / "adapter_model.safetensors"
            ).items()
        }
        for i in (0, 1)
    )
    if before.keys() != v.keys():
        raise SystemExit(f"the direction has {len(v)} tensors, the adapter {len(before)}")
    taken = {name: (after[name] - before[name]) / lr for name in v}
    return {name: float((v[name].double() - t).norm() / t.norm()) for name, t in taken.items()}


def print_cost(results: Results) -> None:
    print("\n| stage | seconds | peak, GiB |\n|---|---|---|")
    for stage in (*results.cost.stages, results.cost.total):
        name = getattr(stage, "stage", "**whole run**")
        print(f"| {name} | {stage.seconds:.1f} | {stage.process_peak_bytes / 2**30:.1f} |")
    print(flush=True)


def print_fresh(pair: list[Fresh], each: int, results: Results) -> None:
    """Every prompt has the same number of responses: the error is that within prompts."""
    (row,) = (row for row in results.sweep if row.is_next_lr)
    difference = pair[1].per_token - pair[0].per_token
    paired = pair[1].influence_N - pair[0].influence_N
    se = within(paired, each)
    alone = sum(within(fresh.influence_N, each) ** 2 for fresh in pair) ** 0.5
    both = (se**2 + row.se_given_U.value**2) ** 0.5
    z = (difference - row.predicted.value) / both
    print(
        f"\nFresh responses: change {difference:.5f} +- {se:.5f} (one standard error; {alone:.5f} were "
        f"their seeds independent)\nPredicted: {row.predicted.value:.5f} +- {row.se_given_U.value:.5f}"
        f"\nz = {z:.2f} {'(within 2)' if abs(z) < 2 else '**missed**: beyond 2'}; "
        f"z of no change: {difference / se:.2f}",
        flush=True,
    )


def within(influence_N: Tensor, each: int) -> float:
    """Standard error of a mean over prompts that all have `each` responses."""
    variance_B = influence_N.view(-1, each).var(1)
    return float((variance_B.mean() / len(influence_N)).sqrt())


if __name__ == "__main__":
    main()
