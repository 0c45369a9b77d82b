"""A loss of one's own: a function of per-token arrays, checked on those of U before it is used."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..types import InputError, ResponseMask
from .loss import Loss, LossFunction, LossInputs, LossValue, loss_gradient

T = TypeVar("T")
SIGNATURE = "(logp, entropy, batch)"
RESULT = "expected a scalar tensor, or (scalar tensor, dict of metrics)"
# A sum over more entries may add them in another order: 1e-16 times the root of their number.
ROUNDING = 1e-12
# Of what torch raises where a tensor that it differentiates is read, changed or differentiated again.
TRACED = ("numpy", "data pointer", "in-place", "inplace", "functorch", "backward")


def custom_loss(function: Callable[..., Any]) -> Loss:
    """The loss function(logp, entropy, batch) -> loss, or (loss, metrics), or LossValue.

    logp and entropy are l and h of U's tokens at theta, [N, R], float64, nats, 0 past the end of a
    response; batch a LossInputs. The loss, a float64 scalar, is that of the whole optimizer step and to
    be minimised; metrics are scalars by name. The three arguments are positional, of any name.

    What its sums are divided by is found by leaving out each prompt (`Loss.divisor` None), so that the
    function must accept any number of sequences. It may be a partial with settings as keywords.

    Raises InputError for a function that cannot be called so. On U, `loss_update` raises InputError for
    one that raises an exception; returns anything else; depends neither on logp nor on entropy in a way
    that torch can differentiate; is not finite or has a gradient that is not; changes its arguments;
    has another value at the second call; depends on what is past the end of the responses, or on how
    far the arrays extend there.
    """
    inner, keywords = function, {}
    if isinstance(function, partial):
        inner, keywords = function.func, function.keywords
    name = f"loss {getattr(inner, '__name__', type(inner).__name__)!r}"
    try:
        inspect.signature(inner).bind(None, None, None, **keywords)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be called with {SIGNATURE}: {error}") from error
    evaluate = partial(_value, function, name)
    return Loss(evaluate, None, None, check=partial(_require_loss, evaluate, name))


class _Evaluated(NamedTuple):
    loss: Float[Tensor, ""]
    logp_gradient_NR: Float[Tensor, "N R"]
    entropy_gradient_NR: Float[Tensor, "N R"]

    @property
    def gradients(self) -> dict[str, Tensor]:
        return {"logp": self.logp_gradient_NR, "entropy": self.entropy_gradient_NR}


def _value(
    function: Callable[..., Any], name: str, logp_NR: Tensor, entropy_NR: Tensor, inputs: LossInputs
) -> LossValue:
    found = _called(lambda: function(logp_NR, entropy_NR, inputs), name)
    loss, metrics = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    if not isinstance(loss, Tensor):
        hint = "; float(), .item() and numpy lose the gradient" if isinstance(loss, Real) else ""
        raise InputError(f"{name} returned {type(loss).__name__}, {RESULT}{hint}")
    if loss.ndim > 0:
        raise InputError(
            f"{name} returned a tensor of shape {tuple(loss.shape)}, {RESULT}: sum it over the tokens "
            "in batch.mask_NR"
        )
    if loss.dtype != torch.float64:
        raise InputError(
            f"{name} returned {loss.dtype}, expected torch.float64 as logp and entropy are: remove the "
            "conversion"
        )
    if not isinstance(metrics, Mapping):
        raise InputError(f"{name} returned metrics of type {type(metrics).__name__}, expected a dict")
    return LossValue(loss, {key: _metric(name, key, x) for key, x in metrics.items()})


def _metric(name: str, key: object, value: object) -> Tensor:
    if isinstance(value, Real):
        value = torch.tensor(float(value), dtype=torch.float64)
    if not (isinstance(key, str) and isinstance(value, Tensor) and value.ndim == 0):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise InputError(
            f"{name} returned the metric {key!r} as {type(value).__name__}{shape}, expected a scalar, "
            "by a name"
        )
    return value.detach()


def _require_loss(
    evaluate: LossFunction,
    name: str,
    logp_NR: Tensor,
    entropy_NR: Tensor,
    inputs: LossInputs,
    real_NR: ResponseMask,
) -> None:
    """InputError unless the function is a differentiable loss of U's tokens. Three evaluations."""
    found = _evaluated(evaluate, name, logp_NR, entropy_NR, inputs)
    _require_finite(name, found)
    for array, gradient_NR in found.gradients.items():
        if bool((past_NR := (gradient_NR != 0) & ~real_NR).any()):
            raise InputError(
                f"{name} has a gradient in {array} at {past_NR.nonzero()[0].tolist()}, past the end of "
                "the response: multiply by batch.mask_NR before summing"
            )
    again = _evaluated(evaluate, name, logp_NR, entropy_NR, inputs)
    if not all(torch.equal(x, y) for x, y in zip(found, again, strict=True)):
        raise InputError(
            f"{name} has two values for the same arguments, {float(found.loss):.17g} and "
            f"{float(again.loss):.17g}, or two gradients: remove what is random in it, or kept between "
            "calls"
        )
    _require_no_padding(evaluate, name, logp_NR, entropy_NR, inputs, real_NR, found)


def _require_no_padding(
    evaluate: LossFunction,
    name: str,
    logp_NR: Tensor,
    entropy_NR: Tensor,
    inputs: LossInputs,
    real_NR: ResponseMask,
    found: _Evaluated,
) -> None:
    """InputError if loss or gradient change with one more column, and other l and h, of padding."""
    wide_NR = _wider(real_NR)
    # Beyond every other value, so that extremes change too; its exponential is far from overflow.
    low, high = logp_NR.min().clamp(min=-20), entropy_NR.max()
    padded = _evaluated(
        evaluate,
        name,
        torch.where(wide_NR, _wider(logp_NR), low - _filling(wide_NR)),
        torch.where(wide_NR, _wider(entropy_NR), high + _filling(wide_NR)),
        _with(inputs, {key: _wider(x) for key, x in _tensors(inputs).items() if x.ndim == 2}),
    )
    _require_finite(f"with other values past the end of the responses {name}", padded)
    scale = float(sum(x_NR.abs().sum() for x_NR in found.gradients.values()))
    off = [abs(float(padded.loss - found.loss)) > ROUNDING * (abs(float(found.loss)) + scale)]
    for array, gradient_NR in found.gradients.items():
        change_NR = padded.gradients[array] - _wider(gradient_NR)
        off.append(bool((change_NR.abs() > ROUNDING * gradient_NR.abs().max()).any()))
    if any(off):
        raise InputError(
            f"{name} depends on padding: with one more column past the end of the responses, and other "
            f"values there, it is {float(padded.loss):.9g} in place of {float(found.loss):.9g}"
            f"{'' if off[0] else ', with another gradient'}; multiply by batch.mask_NR before summing, "
            "and divide by a sum of it, not by a length"
        )


def _evaluated(
    evaluate: LossFunction, name: str, logp_NR: Tensor, entropy_NR: Tensor, inputs: LossInputs
) -> _Evaluated:
    """The loss and its gradients, from copies; InputError if it has none or changes its arguments."""

    def tracked(l_NR: Tensor, h_NR: Tensor, given: LossInputs) -> LossValue:
        found = evaluate(l_NR, h_NR, given)
        if not found.loss.requires_grad:
            raise InputError(
                f"{name} is no function of logp and entropy that torch can differentiate: it is "
                "constant, or computed from detached tensors, under no_grad or with numpy"
            )
        return found

    arrays = {"logp": logp_NR, "entropy": entropy_NR, **_tensors(inputs)}
    copies = {key: x.clone() for key, x in arrays.items()}
    given = _with(inputs, {key: copies[key] for key in _tensors(inputs)})
    found, *gradients = _called(
        lambda: loss_gradient(tracked, copies["logp"], copies["entropy"], given), name
    )
    for key, x in arrays.items():
        same = (copies[key] == x) | x.isnan()  # a sampler's log-probabilities may be NaN
        if not bool(same.all()):
            raise InputError(
                f"{name} changes {key} in place: compute a new tensor, without operations whose name "
                "ends in an underscore, or on a clone()"
            )
    return _Evaluated(found.loss, *gradients)


def _require_finite(name: str, found: _Evaluated) -> None:
    if not bool(found.loss.isfinite()):
        raise InputError(f"{name} is {float(found.loss)} on U, expected a finite number")
    for array, gradient_NR in found.gradients.items():
        if bool((bad_NR := ~gradient_NR.isfinite()).any()):
            at = bad_NR.nonzero()[0].tolist()
            raise InputError(
                f"{name} has the gradient {float(gradient_NR[tuple(at)])} in {array} at {at}, expected "
                "finite numbers: replace what has no derivative (0/0, the log or root of 0) by "
                "torch.where before the operation, as a mask after it leaves 0 times infinity"
            )


def _called(run: Callable[[], T], name: str) -> T:
    """run(), of a user's function, which may raise anything: all of it is raised as InputError."""
    try:
        return run()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raised = " ".join(f"{type(error).__name__}: {error}".split())
        hint = ""
        if isinstance(error, RuntimeError) and any(word in raised for word in TRACED):
            hint = (
                " (torch.func.grad differentiates it: use torch operations alone, without numpy, "
                "in-place changes, backward() and an autograd.Function without setup_context)"
            )
        raise InputError(f"{name} raised {raised}{hint}") from error


def _tensors(inputs: LossInputs) -> dict[str, Tensor]:
    return {key: x for key, x in inputs._asdict().items() if isinstance(x, Tensor)}


def _with(inputs: LossInputs, tensors: dict[str, Any]) -> LossInputs:
    return inputs._replace(**tensors)


def _wider(x_NR: Tensor) -> Tensor:
    """With one more column, of zeros."""
    return torch.cat([x_NR, torch.zeros_like(x_NR[:, :1])], 1)


def _filling(like_NR: Tensor) -> Float[Tensor, "N R"]:
    """Finite numbers in (0, 1], no two of neighbouring entries equal."""
    N, R = like_NR.shape
    number_NR = 3 * torch.arange(N)[:, None] + 5 * torch.arange(R)[None, :]
    return (1 + number_NR % 7).double() / 7
