"""What a long sweep and a long training leave behind, and what large files take before the first pass.

    python benchmarks/load.py sweep [--checkpoints 50]
    python benchmarks/load.py probes [--probes 200]
    python benchmarks/load.py prompts [--rows 2000000] [--kind parquet]
    python benchmarks/load.py rollouts [--responses 100000] [--kind parquet]

Memory (resident, after collection of garbage) and open file handles after each checkpoint of a sweep,
and after each probe of one training; their slopes are by least squares over the later three quarters,
since libraries are loaded and pools filled in the first.

Of large files: seconds until a run could sample or compute, imports aside, and what that added to the
largest memory of the process, in a process of its own. The files are made in --folder, if they are not
there.
"""

import argparse
import contextlib
import gc
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from shapes import machine

from funcprobe.adapters.rollouts import SCHEMA

MIB = 2**20


class Seen(NamedTuple):
    """What a process holds at one moment."""

    rss: int  # bytes
    handles: int
    threads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sweep", "probes", "prompts", "rollouts"])
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--responses", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=256, help="of a response of the rollouts")
    parser.add_argument("--kind", choices=["parquet", "jsonl", "csv"], default="parquet")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/funcprobe-load"))
    parser.add_argument("--whole", action="store_true", help="read every row of the prompts")
    args = parser.parse_args()
    print(f"{machine('cpu')}; load {psutil.getloadavg()[0]:.1f}", flush=True)
    if args.what == "prompts":
        file = args.folder / f"prompts-{args.rows}.{args.kind}"
        _make_prompts(file, args.rows)
        _start(file, {"prompts.source": str(file)}, whole=args.whole)
        return
    if args.what == "rollouts":
        file = args.folder / f"rollouts-{args.responses}-{args.tokens}.{args.kind}"
        _make_rollouts(file, args.responses, args.tokens)
        _start(file, {"rollouts.eval": str(file)})
        return
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


START = """
import json, sys, threading, time, warnings
import psutil
warnings.simplefilter("ignore")
import datasets, torch, transformers
from funcprobe.adapters.config.choices import configuration
from funcprobe.adapters.console import Narrator
from funcprobe.adapters.sampling import large
from funcprobe.adapters.stages.plan import load
large.LARGE = large.LARGE if sys.argv[2] == "0" else sys.maxsize
seen, ends = [], threading.Event()
def look():
    while not ends.wait(0.02):
        seen.append(psutil.Process().memory_info().rss / 2**20)
look_on = threading.Thread(target=look, daemon=True)
before = psutil.Process().memory_info().rss / 2**20
start, cpu = time.perf_counter(), time.process_time()
look_on.start()
plan = load(configuration(json.loads(sys.argv[1])), Narrator())
took, of_cpu = time.perf_counter() - start, time.process_time() - cpu
ends.set()
look_on.join()
print(f"{took:.1f} s ({of_cpu:.1f} s of it on the CPU), {max(seen) - before:.0f} MiB over {before:.0f}")
"""


def _start(file: Path, settings: dict[str, Any], *, whole: bool = False) -> None:
    given = {"policy.checkpoint": "toy", "prompts.source": "toy", "run.max_tokens": 4096} | settings
    print(f"{file.name}, {file.stat().st_size / MIB:.0f} MiB", flush=True)
    done = subprocess.run(
        [sys.executable, "-c", START, json.dumps(given), str(int(whole))],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr[-2000:])


def _make_prompts(file: Path, count: int) -> None:
    """Sums as prompts, their answers, and a text of a hundred characters beside them."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    a, b = rng.integers(10, 70, (2, count))
    rows = [f"{x}+{y}=" for x, y in zip(a, b, strict=True)]
    answers = [str(x + y) for x, y in zip(a, b, strict=True)]
    notes = [f"{i:08d} " * 11 for i in range(count)]
    table = pa.table({"prompt": rows, "answer": answers, "note": notes})
    if file.suffix == ".parquet":
        pq.write_table(table, file)
    elif file.suffix == ".csv":
        pa.csv.write_csv(table, file)
    else:
        with file.open("w", encoding="utf-8") as out:
            for batch in table.to_batches(10_000):
                out.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())


def _make_rollouts(file: Path, count: int, tokens: int) -> None:
    """Four responses a prompt, each with a log-probability for every token."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    fields = ["prompt_index", "prompt_ids", "response_ids", "temperature", "sampler_logp", "response"]
    schema = pa.schema([*(SCHEMA.field(name) for name in fields)])
    lines = file.suffix == ".jsonl"
    with (
        contextlib.nullcontext() if lines else pq.ParquetWriter(file, schema) as parquet,
        file.open("w", encoding="utf-8") if lines else contextlib.nullcontext() as out,
    ):
        for start in range(0, count, 1000):
            index = np.arange(start, min(start + 1000, count)) // 4
            ids = rng.integers(3, 13, (len(index), tokens))
            rows = {
                "prompt_index": index.tolist(),
                "prompt_ids": [[3 + i % 9, 4, 5, 6] for i in index],
                "response_ids": ids.tolist(),
                "temperature": [1.0] * len(index),
                "sampler_logp": (-rng.exponential(2.0, ids.shape)).tolist(),
                "response": ["".join(map(str, row % 10)) for row in ids],
            }
            table = pa.table(rows, schema=schema)
            if parquet is not None:
                parquet.write_table(table)
            else:
                out.writelines(json.dumps(row) + "\n" for row in table.to_pylist())


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
