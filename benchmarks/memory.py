"""The memory of a whole run with run.max_tokens = "auto", on a checkpoint of random weights.

    python benchmarks/memory.py [--shape 0.5B] [--new-tokens 256] [--eval 8] [--update 2] [--samples 4]

Base and adapter are written to --folder once, and probed by `funcprobe run` in a process of its own,
whose resident memory is read twenty times a second. It is ended if less than a GiB is left on the
machine. Printed are what was free before the run, the size that it chose, its peak, and their ratio.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from shapes import SHAPES, machine, with_lora
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

LEFT = 2**30  # bytes
GIB = 2**30
PIECES = ("<pad>", "<eos>", *"0123456789+=")
BOUND = 0.6  # of what was free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5B")
    parser.add_argument("--new-tokens", type=int, default=256, help="sampling.max_new_tokens")
    parser.add_argument("--eval", type=int, default=8, help="sampling.B_E")
    parser.add_argument("--update", type=int, default=2, help="sampling.B_U")
    parser.add_argument("--samples", type=int, default=4, help="sampling.G")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/funcprobe-memory"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    made = args.folder / args.shape
    if not (made / "checkpoint-1").is_dir():  # in a process of its own, whose memory is free again
        maker = multiprocessing.get_context("spawn").Process(target=_make, args=(made, args.shape))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"{made} was not made: exit status {maker.exitcode}")
    (made / "c.toml").touch()
    given = {
        "policy.checkpoint": str(made / "checkpoint-1"),
        "prompts.source": str(made / "prompts.jsonl"),
        "reward.function": f"{made / 'rewards.py'}:third",
        "optimizer.accept_positional": True,
        "run.folder": str(made / "runs"),
        "run.report": False,
        "sampling.max_new_tokens": args.new_tokens,
        "sampling.B_E": args.eval,
        "sampling.B_U": args.update,
        "sampling.G": args.samples,
    }
    sets = [part for k, v in given.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    sets += [part for pair in args.set for part in ("--set", pair)]
    free = psutil.virtual_memory().available
    print(f"{args.shape} shape, {machine('cpu')}; {free / GIB:.1f} GiB free before the run", flush=True)
    main_of = "from funcprobe.adapters.cli import main; main()"
    command = [sys.executable, "-c", main_of, "run", str(made / "c.toml"), "--fresh", *sets]
    with (made / "log").open("w", encoding="utf-8") as log:
        peak, status = _watched(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    lines = (made / "log").read_text(encoding="utf-8").splitlines()
    print(*[line for line in lines if "run.max_tokens" in line or "out of memory" in line], sep="\n")
    if status:
        print(*lines[-5:], f"exit status {status} at {peak / GIB:.1f} GiB", sep="\n")
        sys.exit(1)
    results = json.loads((made / "runs" / "probe" / "results.json").read_text(encoding="utf-8"))
    for stage in results["cost"]["stages"]:
        print(
            f"  {stage['stage']}: {stage['process_peak_bytes'] / GIB:.2f} GiB, {stage['seconds']:.0f} s"
        )
    print(
        f"max_tokens {results['conventions']['max_tokens']}, peak {peak / GIB:.2f} GiB, "
        f"{100 * peak / free:.0f} % of what was free, the model included (bound: {100 * BOUND:.0f} %)"
    )


def _make(folder: Path, shape: str) -> None:
    """A base in float32, a LoRA on all its linear layers after a step of AdamW, prompts, a reward."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": None}
    tokenizer = Qwen2Tokenizer(vocab={p: i for i, p in enumerate(PIECES)}, merges=[], **special)
    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPES[shape]._asdict(),
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    base = Qwen2ForCausalLM(config)
    base.save_pretrained(folder / "base")
    model = with_lora(base)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    for p in trainable:
        p.grad = 1e-4 * torch.randn_like(p)
    optimizer.step()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    checkpoint = folder / "checkpoint-1"
    model.save_pretrained(checkpoint, save_embedding_layers=False)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    for place in (folder / "base", checkpoint):
        tokenizer.save_pretrained(place)
    rows = [{"prompt": f"{a}+{b}=" * 5} for a in range(10, 20) for b in range(10, 20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    # The tokenizer has few of the model's tokens, so that most responses are empty texts.
    reward = (
        "def third(completions, **_):\n    return [float(i % 3) for i in range(len(completions))]\n"
    )
    (folder / "rewards.py").write_text(reward, encoding="utf-8")


def _watched(process: "subprocess.Popen[bytes]") -> tuple[int, int]:
    """(peak of the resident memory, exit status); the process is killed if memory becomes scarce."""
    peak = 0
    seen = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, seen.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        if psutil.virtual_memory().available < LEFT:
            process.kill()
        time.sleep(0.05)
    return peak, process.wait()


if __name__ == "__main__":
    main()
