"""Dropout: what of a model is random in training, and its masks as a function of a seed."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ..autodiff.replaced import Replaced
from ..types import InputError, Params
from .forward import Forward
from .layout import collate, microbatches
from .rows import Rows
from .suitability import causal_lm

# Attributes of modules and configurations that make a forward random in training: dropout under its
# many names, LayerDrop, the jitter of a router.
_RANDOM = ("drop", "jitter")
# Of heads that a causal language model does not have; "pdrop" (GPT-2, Phi) is the p of an nn.Dropout.
_WITHOUT_EFFECT = ("classifier", "summary", "_pdrop")


class Dropout(NamedTuple):
    """A module, or a setting, by which the model's forward is random in training."""

    name: str  # as in lora_dropout
    p: float
    place: str | None  # path of an nn.Dropout; None: a setting that the model's own code reads


def dropouts(model: nn.Module) -> list[Dropout]:
    """What is random in a forward in training mode, whatever the mode is now; [] if nothing is.

    Found by class and by name, since in eval mode none of it runs; without inactive adapters.
    """
    modules = list(_modules(model))
    return modules + list(_settings(model, modules))


def listed(found: Sequence[Dropout]) -> str:
    """Each name with its largest value: "lora_dropout = 0.05, attention_dropout = 0.1"."""
    largest: dict[str, float] = {}
    for one in found:
        largest[one.name] = max(one.p, largest.get(one.name, 0.0))
    return ", ".join(f"{name} = {p:g}" for name, p in largest.items())


def masked_forwards(
    model: nn.Module, params: Params, forward: Forward, count: int, seed: int
) -> list[Forward]:
    """`count` forwards as in training, each with masks of its own; `forward` is that of `model`.

    The input x of an nn.Dropout becomes m x / (1 - p), m Bernoulli(1 - p) for every token and feature.
    m is determined by the seed, the number of the forward in the result, the number of the dropout in
    the model and the sequence's index in the batch, so that neither microbatches nor layout change it
    (another kind of device does, by its generator). Prompts are not shared: a trainer computes each
    response's own, with masks of its own. Raises InputError if nothing has dropout, and if any of it is
    not an nn.Dropout of the backbone's hidden states: attention's, for one, is inside a kernel.
    """
    if count < 2:
        raise InputError(f"{count} dropout masks: at least 2 are expected, for a spread")
    found = dropouts(model)
    if not found:
        raise InputError("the model has no dropout, so that there are no masks to draw: set masks to 0")
    if why := unmaskable(model, params, forward):
        raise InputError(
            f"{why}, of which no mask can be drawn, only of an nn.Dropout of hidden states, such as "
            "LoRA's: set masks to 0"
        )
    return [
        forward._replace(
            hidden=_masked(forward, f"{seed}/{k}"),
            layout="plain" if forward.layout == "plain" else "packed",
        )
        for k in range(count)
    ]


def unmaskable(model: nn.Module, params: Params, forward: Forward) -> str | None:
    """What is random in training but not by an nn.Dropout that this forward calls; None if nothing is.

    Found in a forward of five tokens, with hooks on the dropouts that are gone after it.
    """
    found = dropouts(model)
    if other := [one for one in found if one.place is None]:
        return f"the model is trained with {listed(other)}"
    called: set[str] = set()

    def call(place: str) -> Callable[..., None]:
        return lambda *_: called.add(place)

    modules = dict(model.named_modules())
    (rows,) = microbatches(collate([[0]], [[0] * 4], [0]), max_tokens=5)
    with ExitStack() as stack:
        for one in found:
            assert one.place is not None
            stack.enter_context(modules[one.place].register_forward_hook(call(one.place)))
        masks = stack.enter_context(_Masks("", rows))
        stack.enter_context(torch.no_grad())
        forward.hidden(params, rows)
    if left := [one for one in found if one.place not in called]:
        return f"the backbone does not call {left[0].place} ({listed(left)})"
    if masks.calls > len(found):
        return f"{masks.calls} dropouts act, {len(found)} of them modules"
    return None


def _modules(model: nn.Module) -> Iterator[Dropout]:
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not isinstance(module, nn.modules.dropout._DropoutNd) or not module.p:
            continue
        owner, _, name = path.rpartition(".")
        if owner.endswith("lora_dropout"):  # one for each adapter, in a layer of peft
            layer, adapter, name = modules[owner.rpartition(".")[0]], name, "lora_dropout"
            # LoRA of an embedding never calls its dropout (peft 0.21).
            embeds = adapter in getattr(layer, "lora_embedding_A", ())
            if embeds or adapter not in getattr(layer, "active_adapters", (adapter,)):
                continue
        if not any(word in name for word in _WITHOUT_EFFECT):
            yield Dropout(name, float(module.p), path)


def _settings(model: nn.Module, modules: Sequence[Dropout]) -> Iterator[Dropout]:
    """Numbers over 0 by their names, each name once; configuration that became a module left out."""
    config = getattr(causal_lm(model), "config", None)
    config = getattr(config, "get_text_config", lambda: config)()  # nested in multimodal models
    seen, values = {one.name for one in modules}, {one.p for one in modules}
    for holder in (*model.modules(), *([] if config is None else [config])):
        for name, value in vars(holder).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or value <= 0 or name in seen or not any(word in name for word in _RANDOM):
                continue
            module = holder is config and value in values
            if not module and not any(word in name for word in _WITHOUT_EFFECT):
                seen.add(name)
                yield Dropout(name, float(value), None)


def _masked(forward: Forward, seed: str) -> Callable[..., Tensor]:
    def hidden(params: Params, rows: Rows) -> Float[Tensor, "T D"]:
        with _Masks(seed, rows):
            return forward.hidden(params, rows)

    return hidden


class _Masks(Replaced):
    """Every dropout, also in eval mode, is by masks of (seed, number of the call, sequence)."""

    def __init__(self, seed: str, rows: Rows) -> None:
        super().__init__({functional.dropout: self._drop})
        self.seed, self.shape, self.calls = seed, rows.tokens_NL.shape, 0
        self.sequences = rows.sequence_T.unique().tolist()
        self.lengths, self.token_NL = _places(rows)

    def _drop(
        self,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,  # noqa: ARG002
        inplace: bool = False,  # noqa: ARG002
    ) -> Float[Tensor, "n l D"]:
        if not p:
            return input
        call, self.calls = self.calls, self.calls + 1
        if input.dim() != 3 or input.shape[:2] != self.shape:
            raise InputError(
                f"dropout of a tensor of shape {tuple(input.shape)}, masks are drawn for hidden states "
                f"[{self.shape[0]}, {self.shape[1]}, D] alone: set masks to 0"
            )
        width, device = input.shape[2], input.device
        drawn = [
            torch.rand(
                (length, width),
                generator=_generator(f"{self.seed}/{call}/{sequence}", device),
                device=device,
            )
            for sequence, length in zip(self.sequences, self.lengths, strict=True)
        ]
        kept_NLD = (torch.cat(drawn) >= p)[self.token_NL.to(device)]
        # Scaled before the product, as torch.nn.functional.dropout does.
        return input * (kept_NLD.to(input.dtype) / (1 - p) if p < 1 else kept_NLD.to(input.dtype))


def _places(rows: Rows) -> tuple[list[int], Int[Tensor, "n l"]]:
    """Input tokens of each sequence, and every token of the rows as an index into all of these."""
    n, width = rows.tokens_NL.shape
    if bool((rows.sequence_NL < 0).any()):
        raise ValueError("a prompt is shared by responses, each needs masks of its own")
    position_NL = torch.arange(width).expand(n, -1)
    if rows.packing is not None:
        position_NL = rows.packing.position_1S
    _, sequence_T = rows.sequence_T.unique(return_inverse=True)
    length_n = torch.zeros(int(sequence_T.max()) + 1, dtype=torch.int64).scatter_reduce(
        0, sequence_T, position_NL[rows.row_T, rows.position_T] + 1, "amax"
    )
    start_n = length_n.cumsum(0) - length_n
    within_NL = torch.minimum(position_NL, length_n[rows.sequence_NL] - 1)  # padding has no own mask
    return length_n.tolist(), start_n[rows.sequence_NL] + within_NL


def _generator(seed: str, device: torch.device) -> torch.Generator:
    # By the hash of a text, so that neighbouring calls and sequences are unrelated.
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) >> 1
    return torch.Generator(device).manual_seed(number)
