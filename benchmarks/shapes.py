"""What the benchmarks of speed share: policies of known shapes, rows, paired timing, peak memory.

Weights are random: time and memory do not depend on them. lora_B is random too, as a trained one is,
and the last norm has a gain, so that entropies differ from token to token.
"""

import ctypes
import gc
import itertools
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import funcprobe
from funcprobe import AdamGroup, AdamState, Batch, Params, UpdateBatch
from funcprobe.adapters.machine.allocator import keep_freed_memory

T = TypeVar("T")
Calls: TypeAlias = Mapping[str, Callable[[], object]]
Times: TypeAlias = dict[str, list[float]]  # seconds of every call, a repetition after the other

QWEN_VOCABULARY = 151_936
KEPT = keep_freed_memory()  # as the command line has it
LOGIT_STD = 2.0  # nats; 0.3 as transformers initialises the small shape


class Shape(NamedTuple):
    """A Qwen2 with tied embeddings."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int


SHAPES = {
    "small": Shape(256, 4, 4, 2, 1024, 8192),
    "medium": Shape(512, 8, 8, 2, 2048, 8192),
    "large": Shape(896, 12, 14, 2, 4864, 8192),
    "0.5B": Shape(896, 24, 14, 2, 4864, QWEN_VOCABULARY),  # Qwen2.5-0.5B's
    "1.5B": Shape(1536, 28, 12, 2, 8960, QWEN_VOCABULARY),  # Qwen2.5-1.5B's
}


class Ratio(NamedTuple):
    """Median and quartiles over the repetitions."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def policy(
    shape: str | Shape, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> PeftModel:
    """A Qwen2 of this shape with LoRA of r = 16 on all linears, every weight random, in eval mode."""
    fields = (SHAPES[shape] if isinstance(shape, str) else shape)._asdict()
    torch.manual_seed(seed)
    with torch.device(device):
        base = Qwen2ForCausalLM(Qwen2Config(**fields, tie_word_embeddings=True))
    with torch.no_grad():
        # Not a larger embedding: tied as it is, every token would predict itself.
        gain = LOGIT_STD / (base.config.initializer_range * base.config.hidden_size**0.5)
        base.model.norm.weight.fill_(gain)
    return with_lora(base).to(dtype).eval()


def with_lora(base: PreTrainedModel) -> PeftModel:
    """LoRA of r = 16 on all linears of a model, lora_B random as well."""
    with base.device:
        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return model


def rows(shape: str | Shape, prompts: int, G: int, P: int, R: int, seed: int = 0) -> Batch:
    """`prompts` random prompts of P tokens, G random responses of R tokens to each."""
    vocabulary = (SHAPES[shape] if isinstance(shape, str) else shape).vocab_size
    draw = torch.Generator().manual_seed(seed)
    prompt_BP = torch.randint(vocabulary, (prompts, P), generator=draw)
    response_NR = torch.randint(vocabulary, (prompts * G, R), generator=draw)
    index = [i for i in range(prompts) for _ in range(G)]
    return funcprobe.collate(prompt_BP[index].tolist(), response_NR.tolist(), index)


def update_rows(shape: str | Shape, prompts: int, G: int, P: int, R: int, seed: int = 1) -> UpdateBatch:
    """The same with an advantage for every response, random, of mean 0 among a prompt's G."""
    batch = rows(shape, prompts, G, P, R, seed)
    reward_N = torch.randn(prompts * G, generator=torch.Generator().manual_seed(seed)).double()
    advantage_N = funcprobe.advantages(reward_N, batch.prompt_N, "mean_std")
    return funcprobe.update_batch(batch, advantage_N, "token_mean")


def random_like(params: Params, seed: int = 2) -> Params:
    """A random direction of norm 1."""
    draw = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(t.shape, generator=draw, dtype=torch.float64) for n, t in params.items()}
    norm = funcprobe.tree.norm(drawn)
    return {n: (t / norm).to(params[n]) for n, t in drawn.items()}


def adam_state(params: Params, seed: int = 5) -> AdamState:
    """A state after 100 steps: random moments, lr 1e-5, decay 0.01."""
    nu = {n: 1e-2 * (t * t + 1e-6) for n, t in random_like(params, seed).items()}
    mean = {n: 1e-2 * t for n, t in random_like(params, seed + 1).items()}
    group = AdamGroup(tuple(params), lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
    return AdamState(mean, nu, dict.fromkeys(params, 100), (group,))


def tokens(batch: Batch) -> int:
    """Tokens of all rows, padding not counted."""
    return int((batch.prompt_length_N + batch.response_length_N).sum())


def paired(calls: Calls, repeat: int, device: str = "cpu", *, warm: bool = True) -> Times:
    """Seconds of every call in every repetition, after one that is not counted.

    The calls of a repetition follow each other, in another order each time: a ratio of two of them in
    one repetition holds on a machine whose speed drifts, where a ratio of two medians does not.
    """
    if warm:
        for call in calls.values():
            _seconds(call, device)
    order, shuffle = list(calls), random.Random(0)
    times: Times = {name: [] for name in calls}
    for _ in range(repeat):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(_seconds(calls[name], device))
    return times


def ratio(times: Times, name: str, reference: str) -> Ratio:
    """Seconds of one call over those of another in the same repetition: median and quartiles."""
    each = [a / b for a, b in zip(times[name], times[reference], strict=True)]
    if len(each) == 1:
        return Ratio(each[0], each[0], each[0])
    low, median, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(median, low, high)


def peak_extra(call: Callable[[], T], device: str = "cpu") -> tuple[T, float]:
    """What a call returns, and the MiB it takes at its highest above what was held. Linux, or CUDA."""
    gc.collect()
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        value = call()
        torch.cuda.synchronize(device)
        return value, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide the growth
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    before = resident_mib("VmRSS")
    value = call()
    return value, resident_mib("VmHWM") - before


def peak_tensors(call: Callable[[], object]) -> float:
    """MiB of tensors alive at the highest, above what was held, the allocator left out. CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(n for _, n in changes)) / 2**20


def resident_mib(what: str) -> float:
    """VmRSS (now) or VmHWM (highest so far) of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[what].split()[0]) / 1024


def difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in float64."""
    a, b = (t.detach().to(device="cpu", dtype=torch.float64) for t in (a, b))
    return float((a - b).norm() / b.norm())


def flat(params: Params) -> Tensor:
    """All tensors in one vector, by name."""
    return torch.cat([funcprobe.tree.f64(params[n]).flatten() for n in sorted(params)])


def require_equal(what: str, a: Tensor, b: Tensor, tolerance: float) -> float:
    """Their relative difference; SystemExit if it is over the tolerance: such timings mean nothing."""
    found = difference(a, b)
    if not found <= tolerance:
        raise SystemExit(f"{what}: values differ by {found:.2g}, at most {tolerance:.0e} is allowed")
    return found


def verdict(value: float, bound: float | None, *, at_least: bool = False) -> list[str]:
    """Two cells of a table: the bound, and whether it is kept."""
    if bound is None:
        return ["", ""]
    kept = value >= bound if at_least else value <= bound
    return [f"{'≥' if at_least else '≤'} {bound:g}", "pass" if kept else "**MISS**"]


def print_table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Markdown."""
    print()
    for cells in (columns, ["---"] * len(columns), *body):
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def machine(device: str = "cpu") -> str:
    """Machine, thread count and versions, in one line."""
    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    where = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, {where}"
    load = f"load {os.getloadavg()[0]:.1f}, freed memory {'kept' if KEPT else 'given back'}"
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "peft"))
    return f"{where}, {load}; Python {platform.python_version()}, {versions}"


def _seconds(call: Callable[[], object], device: str) -> float:
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if on_cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
