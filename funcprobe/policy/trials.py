"""What a model can do, found by trying it on a few tokens when it is bound."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..autodiff.grouped import GroupedProducts
from ..types import Batch, InputError, Params
from .layout import collate, out_of_memory
from .parts import after_backbone, backbones
from .placement import input_device, is_hooked
from .precision import StayFloat64, arithmetic_of, rounding
from .reach import SIZE, limits, text_config
from .readout import Readout, values
from .rows import Rows, packed_rows, plain_rows
from .suitability import causal_lm

T = TypeVar("T")
Logits = Callable[[Params, Tensor], Tensor]


def attempt(compute: Callable[[], T]) -> T | str:
    """compute(), or what it raised, on one line: a model's own code may raise anything.

    Raised again are InputErrors, and what says that memory ran out, which is no property of the model.
    """
    try:
        return compute()
    except Exception as error:
        if out_of_memory(error) or isinstance(error, InputError):
            raise
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def find_backbone(
    model: nn.Module, params: Params, logits_of: Callable[[str, Rows], Tensor], temperature: float
) -> str:
    """The path of the backbone, of which rows of several sequences give the model's own logits.

    `logits_of(path, rows)` are the logits by the backbone at that path. InputError if there is none, or
    if the logits depend on later tokens.
    """
    name = type(causal_lm(model)).__name__
    batch = _few(model)
    rows = plain_rows(batch, torch.arange(len(batch.prompt_N)))
    theirs_TV = _own_logits(model, params, batch, rows) / temperature

    def difference(path: str) -> float:
        with torch.no_grad():
            return float((logits_of(path, rows).to(theirs_TV.device) - theirs_TV).abs().max())

    failed = "it has no base model"
    for path in backbones(model):
        worst = attempt(partial(difference, path))
        if isinstance(worst, str):
            failed = worst
        elif worst <= rounding(theirs_TV):
            return path
        else:
            failed = f"logits differ by {worst:.3g}"
    raise InputError(
        f"{name}: its logits are not those of its head after its backbone, sequences side by side, so "
        f"that this architecture is not supported: {failed}"
    )


def _own_logits(model: nn.Module, params: Params, batch: Batch, rows: Rows) -> Tensor:
    """Logits [T, V] by the model's own forward, each sequence alone; InputError if they see ahead."""
    name = type(causal_lm(model)).__name__
    lengths = (batch.prompt_length_N + batch.response_length_N).tolist()
    wide = any(t.dtype == torch.float64 for t in params.values())
    experts = GroupedProducts() if wide else nullcontext()  # whose own product has no float64

    def own(tokens_L: Tensor) -> Tensor:
        out = model(input_ids=tokens_L[None].to(input_device(model)), use_cache=False)
        logits_LV: Tensor = out.logits[0]
        return logits_LV

    def theirs() -> tuple[list[Tensor], Tensor]:
        with torch.no_grad(), arithmetic_of(params), experts:
            alone = [own(ids[: n - 1]) for ids, n in zip(batch.tokens_NL, lengths, strict=True)]
            return alone, own(batch.tokens_NL[0, : lengths[0] - 2])

    found = attempt(theirs)
    if isinstance(found, str):
        raise InputError(f"{name}: its own forward fails: {found}")
    alone, prefix_LV = found
    if not float((alone[0][:-1] - prefix_LV).abs().max()) <= rounding(prefix_LV):
        raise InputError(
            f"{name}: its logits depend on later tokens, so that they are no policy's: a causal model "
            "is expected (for an encoder, is_decoder = true in its config.json)"
        )
    return torch.stack([alone[n][i] for n, i in zip(rows.row_T, rows.position_T, strict=True)])


def find_readout(
    model: nn.Module, path: str, params: Params, logits: Logits, temperature: float
) -> Readout | None:
    """The output embedding with what the model does to its product; None if that has no closed form.

    None if a part of the embedding is trained, if it is not a plain matrix, or if its probabilities,
    with a scale and a softcap found by trial, are not those of the head.
    """
    base = causal_lm(model)
    embedding = base.get_output_embeddings()
    trained = {id(p) for name, p in model.named_parameters() if name in params}
    plain = type(embedding) is nn.Linear and not is_hooked(embedding)
    if not plain or trained & {id(p) for p in embedding.parameters()}:
        return None
    found = _scores(base, path, embedding.weight.shape[1], embedding.weight.device)
    if found is None:
        return None
    bias = None if embedding.bias is None else embedding.bias.detach()
    softcap = None if found.softcap is None else found.softcap / found.scale
    readout = Readout(embedding.weight.detach(), bias, softcap, temperature / found.scale)
    return readout if _reads(params, logits, readout) else None


def unpackable(
    model: nn.Module, path: str, params: Params, hidden: Callable[..., Tensor]
) -> str | None:
    """Why the model cannot process a packed row, from its configuration and a trial; None if it can.

    `hidden(params, rows, size)` are the hidden states with windows of `size` tokens; None: the model's.
    """
    backbone = causal_lm(model).get_submodule(path)
    config = text_config(backbone.config)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return f"packing needs sdpa attention, the model has {config._attn_implementation}"
    kinds = set(getattr(config, "layer_types", None) or ()) - SIZE.keys()
    if kinds:
        return f"the model has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "attn_temperature_tuning", None):
        # By the place in the row, not the position (Llama 4 in transformers 5.23), from 8,192 on.
        return "the model's attention has a temperature that counts tokens of the row"
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{type(backbone).__name__} takes no position_ids"
    # As it is; and, as a window may be longer than any trial, with one of two tokens, even where no
    # type of layer has it, as a model may not go by these.
    sizes = (None, 2) if limits(config) else (None,)
    found = (attempt(partial(_mixes, model, params, hidden, size)) for size in sizes)
    return next((why for why in found if why is not None), None)


def _mixes(
    model: nn.Module, params: Params, hidden: Callable[..., Tensor], size: int | None
) -> str | None:
    """Why packed rows are not plain ones, with windows of `size` tokens; None if they are."""
    batch, every = _few(model), torch.arange(3)
    packed, plain = packed_rows(batch, every, torch.tensor([0, 0, 2])), plain_rows(batch, every)
    with torch.no_grad():
        plain_TD = hidden(params, plain, size)
        packed_TD = hidden(params, packed, size)
    worst, bound = float((packed_TD - plain_TD).abs().max()), rounding(plain_TD)
    return None if worst <= bound else f"a token depends on tokens it cannot attend to, by {worst:.2g}"


class _Scores(NamedTuple):
    """Scores a = scale u, or softcap tanh(scale u / softcap), of the embedding's product u."""

    scale: float
    softcap: float | None


class _Fixed(nn.Module):
    """In place of an output embedding: notes its input, and returns what is given."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.out


def _scores(base: Any, path: str, width: int, device: torch.device) -> _Scores | None:
    """What the model does to the hidden state before its output embedding and to the product after it.

    With the embedding exchanged for chosen products u, in float64 and without its V rows.
    """
    hidden_1D = torch.linspace(-1, 1, width, dtype=torch.float64).to(device)[None]
    # Near 0, where any softcap is straight; where it curves; far beyond.
    u_K = torch.tensor([1e-9, -7.0, -0.3, 0.2, 3.0, 40.0, 1e12], dtype=torch.float64).to(device)
    embedding = _Fixed(u_K[None, None])

    def given() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), StayFloat64():
            (a_K,) = after_backbone(base, path, hidden_1D, embedding)
            return embedding.seen[0].double().view(1, width)[0], a_K.double().view(len(u_K))

    found = attempt(given)
    if isinstance(found, str):
        return None
    x_D, a_K = found
    before = float(x_D @ hidden_1D[0] / hidden_1D.square().sum())
    after, softcap = float(a_K[0] / u_K[0]), float(a_K[-1])
    close = partial(torch.allclose, rtol=1e-12, atol=1e-12 * abs(before))
    if before <= 0 or after <= 0 or not close(x_D, before * hidden_1D[0]):
        return None
    if close(a_K, after * u_K):
        return _Scores(before * after, None)
    bent = softcap > 0 and close(a_K, softcap * torch.tanh(after * u_K / softcap))
    return _Scores(before * after, softcap) if bent else None


def _reads(params: Params, logits: Logits, readout: Readout) -> bool:
    """Whether the readout gives the same probabilities as the head's own logits."""
    count, width = readout.weight_VD.shape
    draw = torch.Generator().manual_seed(0)
    device = readout.weight_VD.device
    hidden_TD = torch.randn(4, width, generator=draw).to(device, readout.weight_VD.dtype)
    target_T = torch.arange(4, device=device) % count
    with torch.no_grad():
        logits_TV = logits(params, hidden_TD)
        if logits_TV.shape[1] != count:
            return False
        wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        theirs_T = torch.log_softmax(wide_TV, -1).gather(-1, target_T[:, None])[:, 0]
        ours_T, _ = values(hidden_TD, target_T, readout)
    # The head applies softcap and temperature in the precision of the logits, the readout in float32.
    bound = rounding(logits_TV) + rounding(theirs_T)
    return float((ours_T - theirs_T).abs().max()) <= bound


def _few(model: nn.Module) -> Batch:
    """Three sequences of several lengths, two of them with one prompt."""
    vocabulary = causal_lm(model).get_output_embeddings().weight.shape[0]
    prompts, responses = [[0, 1, 2], [0, 1, 2], [3]], [[3, 4], [1, 0, 2], [4, 5]]
    x, y = ([[t % vocabulary for t in ids] for ids in part] for part in (prompts, responses))
    return collate(x, y, [0, 0, 1])
