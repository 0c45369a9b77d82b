"""Responses sampled from the current policy, by the engine of the configuration."""

from collections.abc import Callable, Sequence

from funcprobe.progress import NOTHING_KEPT, Progress
from funcprobe.types import InputError

from ..checkpoint.model import Policy
from ..config.schema import SamplingConfig, ServerConfig
from ..console import excerpt
from . import batched
from .responses import Responses


def ended_by(policy: Policy, eos_ids: Sequence[int] | None) -> tuple[Policy, str]:
    """The policy whose responses end with one of `eos_ids`, by default its own, and a line with them.

    Its own are those of TRL 1.16's GRPOTrainer: the tokenizer's and the model's generation config's.
    InputError for an id without a row in the embedding.
    """
    rows = len(policy.model.get_input_embeddings().weight)
    if eos_ids and max(eos_ids) >= rows:
        raise InputError(
            f"sampling.eos_ids has {max(eos_ids)}, but the model has {rows} rows: remove it"
        )
    chosen = tuple(sorted(set(eos_ids))) if eos_ids else policy.eos_ids
    names = ", ".join(f"{i} {excerpt(policy.tokenizer.decode([i]))}" for i in chosen)
    origin = "sampling.eos_ids" if eos_ids else "tokenizer and generation config, as in TRL"
    return policy._replace(eos_ids=chosen), f"responses end with {names} ({origin})"


def sample_responses(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    config: SamplingConfig,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
    indices: Sequence[int] | None = None,
    server: ServerConfig | None = None,
    progress: Progress = NOTHING_KEPT,
) -> Responses:
    """One response per prompt from softmax(logits / temperature), after top_k and top_p if set.

    `indices` are the prompts' positions in the whole batch, by default 0, 1, ...: a response depends
    on the seed, its index and its prompt, so that parts of a batch that are sampled apart, in any order
    and by any number of processes, are the parts of its responses (up to the rounding of the logits,
    which batches of another shape may change). The global random state is restored. `advance` is called
    with the number of sequences that are done. Raises InputError if probabilities are not finite, if
    not even one sequence fits into memory, and if responses would be no samples of this policy.

    What is drawn is kept in `progress`, and an interrupted sampling draws the other responses alone:
    engine "batched" in the same batches, so that they are the same to the bit.

    Engine "server" needs `server`, and has random numbers of its own, by the same seed and index.
    """
    own = range(len(prompt_ids)) if indices is None else indices
    if config.engine == "server":
        from . import server as program  # and with it a client of the network

        assert server is not None  # as the configuration requires
        return program.sample(policy, prompt_ids, config, server, seed, own, advance, progress)
    engine = batched.sample if config.engine == "batched" else _continuous()
    return engine(policy, prompt_ids, config, seed, own, advance, progress)


def _continuous() -> Callable[..., Responses]:
    try:
        from . import continuous
    except ImportError as error:
        raise InputError(
            f'sampling.engine = "continuous" needs transformers 5.23 or later ({error}): set "batched"'
        ) from error
    return continuous.sample
