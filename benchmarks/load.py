"""What a long sweep and a long training leave behind, and what large files take before the first pass.

    python benchmarks/load.py sweep [--checkpoints 50]
    python benchmarks/load.py probes [--probes 200]

Memory (resident, after collection of garbage) and open file handles after each checkpoint of a sweep,
and after each probe of one training; their slopes are by least squares over the later three quarters,
since libraries are loaded and pools filled in the first.
"""

import argparse
import contextlib
import gc
import json
import logging
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from shapes import machine

MIB = 2**20


class Seen(NamedTuple):
    """What a process holds at one moment."""

    rss: int  # bytes
    handles: int
    threads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sweep", "probes"])
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--probes", type=int, default=200)
    args = parser.parse_args()
    print(f"{machine('cpu')}; load {psutil.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if args.what == "sweep":
            _report("checkpoints of a sweep", _sweep(Path(scratch), args.checkpoints))
        else:
            _report("probes of a training", _probes(Path(scratch), args.probes))


def _sweep(folder: Path, count: int) -> list[Seen]:
    """The toy's checkpoints, again and again under other names, each with a report."""
    from funcprobe.adapters import sweep
    from funcprobe.adapters.checkpoint.toy import ensure_toy_training
    from funcprobe.adapters.config.choices import configuration
    from funcprobe.adapters.console import Narrator

    toy = ensure_toy_training(print)
    own = sorted(toy.base.parent.glob("checkpoint-*"))
    for i in range(count):
        shutil.copytree(own[i % len(own)], folder / "out" / f"checkpoint-{i + 1}")
    config = configuration(
        {
            "prompts.source": str(toy.prompts),
            "run.folder": str(folder / "runs"),
            "run.name": "load",
            "sampling.B_E": 32,
            "sampling.B_U": 8,
            "sampling.max_new_tokens": 12,
            "measure.etas": [1e-5],
        }
    )
    seen: list[Seen] = []
    whole = sweep._outcome

    def outcome(*given: Any, **named: Any) -> Any:
        found = whole(*given, **named)
        assert found.failed is None, found.failed
        seen.append(_now())
        return found

    sweep._outcome = outcome
    sweep.sweep(config, [str(folder / "out" / "checkpoint-*")], Narrator())
    return seen


def _probes(folder: Path, count: int) -> list[Seen]:
    """A tiny policy trained by transformers' Trainer, every step of it probed."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        PrinterCallback,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2Tokenizer,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from funcprobe.adapters.config.choices import configuration
    from funcprobe.adapters.trainers import ProbeCallback

    pieces = ("<pad>", "<eos>", *"0123456789+=")
    tokenizer = Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token=None,
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(pieces)}
    base = Qwen2ForCausalLM(Qwen2Config(**shape, **heads))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [torch.randint(2, 14, (12,)).tolist() for _ in range(64)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(200)))
    trainer = Trainer(
        model=get_peft_model(base, lora),
        args=TrainingArguments(
            output_dir=str(folder / "out"),
            use_cpu=True,
            max_steps=count,
            save_strategy="no",
            logging_strategy="no",
            per_device_train_batch_size=4,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
        processing_class=tokenizer,
    )
    config = {
        "prompts.source": str(prompts),
        "sampling.B_E": 16,
        "sampling.max_new_tokens": 8,
        "run.max_tokens": 512,
    }
    seen: list[Seen] = []

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(_now())

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProbeCallback(trainer, every=1, config=configuration(config)))
    trainer.add_callback(Look())
    trainer.train()
    probed = [e for e in trainer.state.log_history if "funcprobe/predicted" in e]
    assert len(probed) == count, f"{len(probed)} of {count} steps were probed"
    return seen


def _now() -> Seen:
    gc.collect()
    process = psutil.Process()
    return Seen(process.memory_info().rss, process.num_fds(), threading.active_count())


def _report(what: str, seen: Sequence[Seen]) -> None:
    later = len(seen) // 4
    print(f"{len(seen)} {what}; slopes over the last {len(seen) - later}")
    for name, unit, values in (
        ("memory", "MiB", [one.rss / MIB for one in seen]),
        ("file handles", "", [float(one.handles) for one in seen]),
        ("threads", "", [float(one.threads) for one in seen]),
    ):
        slope = _slope(values[later:])
        shown = ", ".join(f"{x:.0f}" for x in values[:: max(1, len(values) // 10)])
        print(
            f"{name}: first {values[0]:.1f}, then {values[later]:.1f}, last {values[-1]:.1f} {unit}; "
            f"slope {slope:+.3f} {unit} each; {shown}"
        )


def _slope(values: Sequence[float]) -> float:
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(values), dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        start = time.perf_counter()
        main()
        print(f"{time.perf_counter() - start:.0f} s")
