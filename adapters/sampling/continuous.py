"""Engine "continuous": transformers' continuous batching; a response that ends makes room for another.

It has the draws of engine "batched" (`draws`), so that the responses are the same, up to the rounding
of the logits, however the requests come together in its steps.
"""

import gc
import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

from funcprobe.policy.layout import out_of_memory
from funcprobe.policy.suitability import causal_lm
from funcprobe.policy.trials import attempt
from funcprobe.progress import NOTHING_KEPT, Progress
from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..config.schema import SamplingConfig
from ..machine.devices import random_state_kept
from .batch_size import batch_size
from .batched import NOT_FINITE, too_long
from .drawn import are_packed, packed, unpacked
from .draws import chosen, uniforms, warpers
from .own_logits import TRIED, gap, refused
from .responses import Responses, through_first_eos, tokens_of

PAGE = 32  # tokens of the cache that are given to a response at once
CHUNK = 512  # tokens of a step, prompts included; its mask is CHUNK times all tokens of the cache
LOGGER = "ContinuousBatchingLogger"  # which prints tracebacks of errors that are raised here
REMEDY = 'set sampling.engine = "batched"'


def sample(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    config: SamplingConfig,
    seed: int,
    indices: Sequence[int],
    advance: Callable[[int], None],
    progress: Progress = NOTHING_KEPT,
) -> Responses:
    """As `batched.sample`; where memory runs out, the others with half as many responses at once.

    Each response is kept in `progress` when it ends. InputError also where continuous batching does not
    have the model, or has other logits.
    """
    most = at_once = batch_size(policy, config, max(map(len, prompt_ids)))
    u_NR = uniforms(seed, indices, config.max_new_tokens).to(policy.model.device)
    with random_state_kept(), torch.no_grad():
        require_own_logits(policy, prompt_ids)
        plan = (len(prompt_ids), config.max_new_tokens)
        vocabulary = len(policy.model.get_input_embeddings().weight)
        kept = progress.begin(plan, lambda found: are_packed(found.tensors, *plan, vocabulary))
        ids = {} if kept.so_far is None else unpacked(kept.so_far.tensors)[0]
        finite = True
        while left := [i for i in range(len(prompt_ids)) if i not in ids]:
            draws = _Draws(config, u_NR[left])
            own = [prompt_ids[i] for i in left]
            made = _generated(policy, own, config.max_new_tokens, at_once, draws)
            try:
                with closing(made):  # the thread ends with an interruption, too
                    for k, found in made:
                        ids[left[k]] = through_first_eos(found, policy.eos_ids)
                        advance(1)
                        kept.keep((len(ids),), partial(packed, dict(ids)))
                finite = bool(draws.finite)
                break
            except (RuntimeError, MemoryError) as error:
                if not (isinstance(error, MemoryError) or out_of_memory(error)):
                    raise
                if at_once == 1:
                    raise too_long(policy, prompt_ids, config) from error
            at_once //= 2
    if not finite:
        raise InputError(NOT_FINITE)
    cut = [ids[i] for i in range(len(prompt_ids))]
    finished = [y[-1] in policy.eos_ids for y in cut]
    lines = (f"out of memory: {at_once} responses at once, then",) if at_once < most else ()
    return Responses(cut, finished, tokens_of(prompt_ids, cut), 0, lines=lines)


def require_own_logits(policy: Policy, prompt_ids: Sequence[Sequence[int]]) -> None:
    """InputError unless continuous batching has the logits of a forward, by a trial on two prompts."""
    by_length = {len(ids): ids for ids in prompt_ids}
    two = [by_length[length] for length in sorted(by_length)[:2]]

    def tried() -> float:
        seen = _Recorded()
        found = dict(_generated(policy, two, TRIED, len(two), seen))
        gaps = [gap(policy, two[i], found[i], torch.stack(seen.scores[i])) for i in range(len(two))]
        return 0.0 if any(map(math.isnan, gaps)) else max(gaps)  # NaN: sampling says so

    worst = attempt(tried)
    if isinstance(worst, str):
        name = type(causal_lm(policy.model)).__name__
        raise InputError(f"{name}: continuous batching fails: {worst}: {REMEDY}")
    if worst > 1:
        raise refused(policy, "continuous batching", REMEDY)


class _OfRequests(ContinuousBatchingLogitsProcessor):
    """Knows for every row of the logits its prompt, and how many tokens of its response there are."""

    supported_kwargs: ClassVar[dict[str, type]] = {}  # type: ignore[misc]
    ignored_kwargs = ()

    def __init__(self) -> None:
        self.prompt_of: dict[str, int] = {}  # by the name of the request
        self.now: list[tuple[int, int]] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        self.now = []
        for request in requests_with_new_token:
            state = request.state
            # A request that was taken out for want of memory has its tokens as a part of its prompt.
            given = len(state.initial_tokens)
            early = given - (state._true_initial_tokens or given)
            self.now.append((self.prompt_of[state.request_id], early + state.generated_len()))
        return torch.zeros(len(self.now), dtype=torch.int32)


class _Draws(_OfRequests):
    """`draws.Draws`: the drawn token's score is 0, all others' are -inf."""

    def __init__(self, config: SamplingConfig, u_NR: Tensor) -> None:
        super().__init__()
        self.warpers = warpers(config)
        self.u_NR = u_NR
        self.finite = torch.ones((), dtype=torch.bool, device=u_NR.device)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:  # noqa: ARG002
        if not self.now:
            return scores
        row_N, step_N = torch.tensor(self.now).T
        # Prompts that do not end in this step have a row past the others, of no meaning.
        drawn_NV = scores[: len(self.now)]
        logits_NV: Tensor = self.warpers(torch.empty(0), drawn_NV)  # type: ignore[arg-type]
        token_N, finite_N = chosen(logits_NV, self.u_NR[row_N, step_N])
        self.finite = self.finite & finite_N.all()
        out_NV = torch.full_like(scores, -torch.inf)
        out_NV[: len(self.now)].scatter_(1, token_N[:, None], 0.0)
        return out_NV


class _Recorded(_OfRequests):
    """Keeps the logits, by prompt, from which the likeliest token is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: dict[int, list[Tensor]] = {}

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:  # noqa: ARG002
        for (row, _), scores_V in zip(self.now, scores, strict=False):  # as above
            self.scores.setdefault(row, []).append(scores_V.clone())
        return scores


def _generated(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    most: int,
    at_once: int,
    processor: _OfRequests,
) -> Generator[tuple[int, list[int]], None, None]:
    """(number of the prompt, response) as they end; closed, the model is as it was.

    Raises the error of the thread that generates.
    """
    model = causal_lm(policy.model)
    settings = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=most,
        eos_token_id=list(policy.eos_ids),
        pad_token_id=policy.pad_id,
    )
    pages = math.ceil((max(map(len, prompt_ids)) + most) / PAGE)
    batching = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=min(at_once, len(prompt_ids)) * pages + 1,
        max_batch_tokens=max(CHUNK, at_once),
        max_requests_per_batch=at_once,
        # The draws of a step are made on the CPU while it is prepared: no graph, and no second step.
        use_cuda_graph=False,
        use_async_batching=False,
        auto_switch_to_flash=False,  # half precision only, and another attention than the policy's
        seed=0,  # of nothing, as no random numbers are drawn there
    )
    with _quiet(), _attention_kept(model), _few_to_collect():
        manager = model.init_continuous_batching(
            generation_config=settings, continuous_batching_config=batching
        )
        own = manager.logit_processor
        own.logits_processor = LogitsProcessorList([processor])
        own.tensors_required, own.do_processing = 1, True
        names = manager.add_requests([list(ids) for ids in prompt_ids], max_new_tokens=most)
        processor.prompt_of = {name: i for i, name in enumerate(names)}
        waiting = len(names)
        try:
            manager.start()
            while waiting:
                runs = manager.is_running()  # asked before: what it makes at its end is in the queue
                found = manager.get_result(timeout=1)
                failed = manager.background_thread_status.fatal_error
                if failed is not None:
                    raise failed
                if found is None and not runs:
                    raise RuntimeError("its thread ended before the responses")
                if found is not None and found.error is not None:
                    raise RuntimeError(found.error)
                if found is not None and found.is_finished():
                    waiting -= 1
                    yield processor.prompt_of[found.request_id], found.generated_tokens
        finally:
            manager.stop(block=True, hard_stop=waiting > 0)
            manager.destroy()


@contextmanager
def _attention_kept(model: Any) -> Iterator[None]:
    """Eager attention is replaced by a paged one meanwhile, which only a manager that ran puts back."""
    before = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


@contextmanager
def _few_to_collect() -> Iterator[None]:
    """At its end a manager collects garbage twice, over all objects of the process: here, its own."""
    if gc.get_freeze_count():  # someone else's, which unfreezing would end
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger(LOGGER)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
