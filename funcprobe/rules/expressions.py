"""The values of expressions over the columns of U's tokens, float64 tensors [N, R]."""

import ast
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..types import InputError
from .columns import column
from .grammar import Expression, number, shown
from .rule import RuleInputs

_ARITHMETIC: dict[type[ast.operator], Callable[[Tensor, Tensor], Tensor]] = {
    ast.Add: torch.add,
    ast.Sub: torch.sub,
    ast.Mult: torch.mul,
    ast.Div: torch.div,
    ast.Pow: torch.pow,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Tensor, Tensor], Tensor]] = {
    ast.Lt: torch.lt,
    ast.LtE: torch.le,
    ast.Gt: torch.gt,
    ast.GtE: torch.ge,
    ast.Eq: torch.eq,
    ast.NotEq: torch.ne,
}
_LOGIC: dict[type[ast.boolop], Callable[[Tensor, Tensor], Tensor]] = {
    ast.And: torch.logical_and,
    ast.Or: torch.logical_or,
}
_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
}
_EXTREMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"min": torch.minimum, "max": torch.maximum}


def evaluate(expression: Expression, inputs: RuleInputs) -> Tensor:
    """Its value at every token [N, R]: float64, or bool of a condition; 0 or False off the mask.

    Every operation is evaluated at every token, whatever `and`, `or` and `where` choose. InputError if
    an operand of a comparison, of a function over all tokens or the result is not finite at a token in
    the mask, which is named; or where a column needs what the inputs have not.
    """
    if not bool(inputs.mask_NR.any()):
        value = torch.zeros(inputs.mask_NR.shape, dtype=torch.float64)
        return value.bool() if expression.kind == "condition" else value
    value_NR = _value(expression.tree, inputs, expression.text).expand(inputs.mask_NR.shape)
    if expression.kind == "number":
        _require_finite(value_NR, expression.tree, inputs, expression.text)
        return torch.where(inputs.mask_NR, value_NR, 0.0)
    return value_NR & inputs.mask_NR


def _value(node: ast.expr, inputs: RuleInputs, text: str) -> Tensor:
    """Of a node that was checked, [N, R] or a scalar."""

    def of(part: ast.expr) -> Tensor:
        return _value(part, inputs, text)

    def finite(part: ast.expr) -> Tensor:
        value = of(part)
        _require_finite(value, part, inputs, text)
        return value

    match node:
        case ast.BoolOp():
            value = _folded(_LOGIC[type(node.op)], [of(part) for part in node.values])
        case ast.UnaryOp(op=ast.Not()):
            value = ~of(node.operand)
        case ast.UnaryOp(op=ast.USub()):
            value = -of(node.operand)
        case ast.UnaryOp():
            value = of(node.operand)
        case ast.Compare():
            sides = [finite(part) for part in (node.left, *node.comparators)]
            pairs = zip(node.ops, sides[:-1], sides[1:], strict=True)
            found = [_COMPARISONS[type(op)](x, y) for op, x, y in pairs]
            value = _folded(torch.logical_and, found)
        case ast.BinOp():
            value = _ARITHMETIC[type(node.op)](of(node.left), of(node.right))
        case ast.Call(func=ast.Name(id=name)):
            value = _called(name, node.args, inputs, of, finite)
        case ast.Name():
            value = column(node.id, inputs)
        case _:
            assert isinstance(node, ast.Constant)
            value = torch.tensor(number(node, text), dtype=torch.float64)
    return value


def _called(
    name: str,
    args: list[ast.expr],
    inputs: RuleInputs,
    of: Callable[[ast.expr], Tensor],
    finite: Callable[[ast.expr], Tensor],
) -> Tensor:
    if name in _ELEMENTWISE:
        return _ELEMENTWISE[name](of(args[0]))
    if name in _EXTREMES:
        return _folded(_EXTREMES[name], [of(part) for part in args])
    if name == "where":
        condition, x, y = (of(part) for part in args)
        return torch.where(condition, x, y)
    x_NR = finite(args[0]).expand(inputs.mask_NR.shape)
    x_T = x_NR[inputs.mask_NR]
    if name == "mean":
        return x_T.mean()
    if name == "quantile":
        return _quantile(x_T, float(of(args[1])))
    return torch.searchsorted(x_T.sort().values, x_NR.contiguous()).double() / len(x_T)


def _quantile(x_T: Tensor, q: float) -> Tensor:
    """Linear between two order statistics; torch.quantile's, which accepts at most 2**24 values."""
    sorted_T, at = x_T.sort().values, q * (len(x_T) - 1)
    low = math.floor(at)
    return torch.lerp(sorted_T[low], sorted_T[min(low + 1, len(x_T) - 1)], at - low)


def _folded(operation: Callable[[Tensor, Tensor], Tensor], values: list[Tensor]) -> Tensor:
    result = values[0]
    for value in values[1:]:
        result = operation(result, value)
    return result


def _require_finite(value: Tensor, node: ast.expr, inputs: RuleInputs, text: str) -> None:
    bad_NR = inputs.mask_NR & ~value.isfinite()
    if bool(bad_NR.any()):
        i, k = bad_NR.nonzero()[0].tolist()
        found = float(value.expand(bad_NR.shape)[i, k])
        raise InputError(
            f"expression {shown(text)}: {shown(ast.unparse(node))} is {found} at token {k} of response "
            f"{i}, expected a finite number: exclude 0/0 and log(0), as by max(x, 1e-9)"
        )
