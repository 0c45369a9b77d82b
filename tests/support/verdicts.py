"""Whether a policy is right: against peft's own logits, differences in float64, and generation."""

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig

import funcprobe
from funcprobe.adapters.checkpoint.model import Policy
from funcprobe.adapters.sampling.batched import pads
from funcprobe.policy.precision import StayFloat64
from funcprobe.policy.trials import attempt
from funcprobe.types import InputError
from support.every_architecture import VOCABULARY, one_by_one, small_policy, untried
from support.policies import random_batch, random_like

TEMPERATURE = 0.7
# Prompts shared and single, sequences longer than the windows and chunks of `every_architecture`.
BATCH = random_batch([(0, 6, 6), (1, 5, 3), (2, 1, 8), (0, 6, 2)], vocabulary=VOCABULARY)


class Verdict(NamedTuple):
    """What the page says of one class."""

    right: bool
    layout: str = ""
    why: str = ""  # of a slower way, or of the refusal
    closed: bool = False  # derivatives of the output embedding
    generation: str = ""  # prompts padded, or only those of one length together, or refused


class Untried(NamedTuple):
    """A class of which no small policy can be made here."""

    why: str


class WrongError(AssertionError):
    """A number that is not the policy's, and no refusal."""


def verdict(model_type: str) -> Verdict | Untried:
    """Right, or the line that refuses; WrongError where a number is neither."""
    if why := untried(model_type):
        return Untried(why)
    model = attempt(lambda: small_policy(model_type))
    if isinstance(model, str):
        return Untried(f"peft or transformers fail to build it: {model}")
    try:
        probe = funcprobe.bind(model, temperature=TEMPERATURE, max_tokens=64)
    except InputError as error:
        return Verdict(False, why=str(error))
    _require_logits(model, probe)
    generation = _require_generation(model)
    wide = small_policy(model_type, torch.float64)
    try:
        exact = funcprobe.bind(wide, temperature=TEMPERATURE, max_tokens=64)
    except InputError as error:
        return Verdict(False, why=f"in float64: {error}")
    _require_derivatives(one_by_one(model_type), exact)
    (*notes,) = probe.forward.notes
    why = next((n.split(": ", 1)[1] for n in notes if n.startswith("one sequence per row")), "")
    return Verdict(True, probe.forward.layout, why, probe.forward.readout is not None, generation)


def own_logp(model: PeftModel, params: funcprobe.Params | None = None, *, padded: bool) -> Any:
    """l of every response token from the model's own logits: one batch with a mask, or each alone."""
    lengths_N = BATCH.prompt_length_N + BATCH.response_length_N
    mask_NL = (torch.arange(int(lengths_N.max())) < lengths_N[:, None]).long()

    def logits(ids_NL: torch.Tensor, **more: Any) -> torch.Tensor:
        given = {"input_ids": ids_NL, "use_cache": False} | more
        out = model(**given) if params is None else torch.func.functional_call(model, params, (), given)
        return out.logits

    found_NR = torch.zeros(MASK_NR_OF_BATCH.shape, dtype=torch.float64)
    with torch.no_grad():
        every_NLV = logits(BATCH.tokens_NL, attention_mask=mask_NL) if padded else None
        for i, (x, y) in enumerate(zip(BATCH.prompt_length_N, BATCH.response_length_N, strict=True)):
            ids_L = BATCH.tokens_NL[i, : x + y]
            scores_LV = logits(ids_L[None])[0] if every_NLV is None else every_NLV[i]
            logp_RV = (scores_LV[x - 1 : x + y - 1].double() / TEMPERATURE).log_softmax(-1)
            found_NR[i, :y] = logp_RV.gather(1, ids_L[x:, None])[:, 0]
    return found_NR


MASK_NR_OF_BATCH = funcprobe.response_mask(BATCH)


def _require_logits(model: PeftModel, probe: funcprobe.Probe) -> None:
    ours_NR = probe.token_stats(probe.params, BATCH).logp_NR
    for padded in (False, True):
        error = float((ours_NR - own_logp(model, padded=padded)).abs().max())
        # float32: some hundred roundings of scores of size 10.
        if not error <= 1e-4:
            raise WrongError(f"log-probabilities are off by {error:.2g} (padded: {padded})")


def _require_derivatives(own: PeftModel, probe: funcprobe.Probe) -> None:
    v, eta = random_like(probe.params), 1e-6
    with StayFloat64():
        ends = [
            own_logp(own, funcprobe.tree.axpy(s * eta, v, probe.params), padded=False)
            for s in (1.0, -1.0)
        ]
    measured_NR = (ends[0] - ends[1]) / (2 * eta)
    _, tangent = probe.tangents(probe.params, BATCH, v)
    # eta^2 times a third derivative, rounding 1e-15 / eta; relative to the largest.
    error = float((tangent.logp_NR - measured_NR).abs().max() / measured_NR.abs().max())
    if not error <= 1e-5:
        raise WrongError(f"tangents differ from differences by {error:.2g} of the largest")
    p_NR, q_NR = (random_like({"p": tangent.logp_NR}, seed=s)["p"] * MASK_NR_OF_BATCH for s in (2, 3))
    X = probe.weighted_grad(probe.params, BATCH, p_NR, q_NR)
    terms = p_NR * tangent.logp_NR + q_NR * tangent.entropy_NR
    error = abs(funcprobe.tree.dot(X, v) - float(terms.sum())) / float(terms.abs().sum())
    if not error <= 1e-10:
        raise WrongError(f"<X, v> by the two routes differs by {error:.2g}")
    dots_N, _ = probe.grad_dots(probe.params, BATCH, v, p_NR=p_NR, q_NR=q_NR)
    error = float((dots_N - terms.sum(1)).abs().max() / terms.abs().sum())
    if not error <= 1e-10:
        raise WrongError(f"<X_n, v> of sequences by hooks differs by {error:.2g}")
    twice = float(probe.alpha_vjp(probe.params, BATCH, v, p_NR=p_NR, q_NR=q_NR).sum())
    error = abs(twice - float(terms.sum())) / float(terms.abs().sum())
    if not error <= 1e-10:
        raise WrongError(f"reverse over reverse differs by {error:.2g}")


def _require_generation(model: PeftModel) -> str:
    """Logits of generation, padded where the product pads, against a plain forward; how it is done."""
    prompts = [[5, 6, 7, 8, 9, 4, 3], [3, 4, 5, 6]]
    policy = Policy(model, None, {}, (), 0, "", None, "", ())
    try:
        padded = pads(policy, prompts)
    except InputError:
        return "refused"
    for part in [prompts] if padded else [[x] for x in prompts]:
        longest = max(map(len, part))
        ids_NL = torch.tensor([[0] * (longest - len(x)) + x for x in part])
        mask_NL = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in part])
        out = model.generate(
            input_ids=ids_NL,
            attention_mask=mask_NL,
            generation_config=GenerationConfig(
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            ),
        )
        scores_NRV = torch.stack(out.logits, 1)
        for i, prompt in enumerate(part):
            start = longest - len(prompt)
            with torch.no_grad():
                plain_LV = model(input_ids=out.sequences[i : i + 1, start:], use_cache=False).logits[0]
            error = float((scores_NRV[i] - plain_LV[len(prompt) - 1 : -1]).abs().max())
            if not error <= 1e-4 * float(plain_LV.abs().max()):
                raise WrongError(f"logits of generation are off by {error:.2g} (padded: {padded})")
    return "padded" if padded else "by length"
