"""Expressions over the columns of U's tokens: parsed by a grammar of their own, never run as code.

    or, and, not;  < <= > >= == !=, also chained;  + - * / **, unary -;  numbers, columns, parentheses
    abs(x) exp(x) log(x) min(x, y, ...) max(x, y, ...) where(condition, x, y)
    mean(x) quantile(x, q) rank(x)       over all tokens of U in the loss

Python's parser reads the text, after every token of it was found to be one of these; the tree that it
makes is checked node by node before `expressions` computes anything.
"""

import ast
import difflib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, TypeAlias

from ..types import InputError
from .columns import COLUMNS

Kind: TypeAlias = Literal["number", "condition"]

LONGEST, DEEPEST = 500, 30  # characters, nested operations

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])"
_TOKEN = re.compile(rf"\s+|{_NUMBER}|[A-Za-z_][A-Za-z_0-9]*|\*\*|[<>=!]=|[-+*/<>(),]", re.ASCII)

_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
_EXTREMES = ("min", "max")

FUNCTIONS: dict[str, str] = {
    "abs": "abs(x): absolute value",
    "exp": "exp(x): exponential",
    "log": "log(x): natural logarithm",
    "min": "min(x, y, ...): the smallest of its arguments, token by token",
    "max": "max(x, y, ...): the largest of its arguments, token by token",
    "where": "where(condition, x, y): x where the condition holds, else y",
    "mean": "mean(x): the mean over U's tokens in the loss",
    "quantile": "quantile(x, q): the q-quantile over U's tokens in the loss, linear between two",
    "rank": "rank(x): the share of U's tokens in the loss whose x is smaller, from 0 to below 1",
}
"""How every function is called, and what it is."""


class Expression(NamedTuple):
    """A checked expression; `tree` holds nothing but the nodes that are evaluated."""

    text: str
    kind: Kind
    columns: frozenset[str]
    tree: ast.expr


def parse(text: str, kind: Kind) -> Expression:
    """The expression of a text, "number" or "condition" as asked.

    InputError, one line, for anything that is not in the grammar: its first wrong token, an unknown
    column with the nearest one, a wrong number of arguments, a condition where a number is expected and
    the reverse, more than 500 characters or 30 nested operations.
    """
    text = " ".join(text.split())
    _require_tokens(text)
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else type(error).__name__
        raise InputError(f"expression {shown(text)} cannot be read: {reason}") from None
    found = _kind(tree, text, 0)
    if found != kind:
        cure = "write where(condition, 1, 0)" if kind == "number" else "compare it, as in advantage < 0"
        raise InputError(f"expression {shown(text)} is a {found}, expected a {kind}: {cure}")
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return Expression(text, kind, frozenset(names & COLUMNS.keys()), tree)


def _require_tokens(text: str) -> None:
    if not text:
        raise InputError("the expression is empty, expected a condition or a number over the columns")
    if len(text) > LONGEST:
        raise InputError(f"an expression has {len(text)} characters, at most {LONGEST} are read")
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise InputError(
                f"expression {shown(text)} cannot be read at {text[at : at + 10]!r}: expected numbers, "
                "columns, functions, parentheses, + - * / ** < <= > >= == != and or not"
            )
        at = match.end()


def _kind(node: ast.expr, text: str, depth: int) -> Kind:
    """Checks a node and all below it, and says what it is."""
    if depth > DEEPEST:
        raise InputError(f"expression {shown(text)} nests more than {DEEPEST} operations: simplify it")

    def expect(part: ast.expr, kind: Kind) -> None:
        if (found := _kind(part, text, depth + 1)) != kind:
            raise InputError(
                f"expression {shown(text)}: {shown(ast.unparse(part))} is a {found}, expected a {kind}"
            )

    for part, kind in _parts(node, text):
        expect(part, kind)
    return "condition" if isinstance(node, ast.BoolOp | ast.Compare) or _negates(node) else "number"


def _negates(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _parts(node: ast.expr, text: str) -> Iterator[tuple[ast.expr, Kind]]:
    """What the node is made of, each with the kind that it must have; InputError for another node."""
    match node:
        case ast.BoolOp():
            yield from ((part, "condition") for part in node.values)
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand, "condition"
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            yield node.operand, "number"
        case ast.Compare() if all(isinstance(op, _COMPARISONS) for op in node.ops):
            yield from ((part, "number") for part in (node.left, *node.comparators))
        case ast.BinOp() if isinstance(node.op, _ARITHMETIC):
            yield from ((part, "number") for part in (node.left, node.right))
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            yield from _arguments(name, node.args, text)
        case ast.Name():
            _require_column(node.id, text)
        case ast.Constant():
            number(node, text)
        case _:
            raise InputError(
                f"expression {shown(text)}: {_operation(node)} is not part of an expression; write "
                "numbers, columns, comparisons, and, or, not, + - * / ** and functions"
            )


def _operation(node: ast.expr) -> str:
    """What a node does, by the name that Python's grammar has for it."""
    if isinstance(node, ast.BinOp | ast.UnaryOp):
        return type(node.op).__name__
    if isinstance(node, ast.Compare):
        return next(type(op).__name__ for op in node.ops if not isinstance(op, _COMPARISONS))
    return type(node).__name__


def _arguments(name: str, args: list[ast.expr], text: str) -> Iterator[tuple[ast.expr, Kind]]:
    if name not in FUNCTIONS:
        raise InputError(f"expression {shown(text)}: unknown function {nearest(name, FUNCTIONS)}")
    wanted = {"where": 3, "quantile": 2}.get(name, 1)
    enough = len(args) >= 2 if name in _EXTREMES else len(args) == wanted
    if not enough:
        raise InputError(f"expression {shown(text)}: {len(args)} arguments of {FUNCTIONS[name]}")
    if name == "quantile":
        _require_quantile(args[1], text)
    for i, argument in enumerate(args):
        yield argument, "condition" if name == "where" and i == 0 else "number"


def _require_quantile(node: ast.expr, text: str) -> None:
    if not isinstance(node, ast.Constant) or not 0 <= number(node, text) <= 1:
        raise InputError(
            f"expression {shown(text)}: q of quantile(x, q) is {shown(ast.unparse(node))}, expected a "
            "number from 0 to 1"
        )


def _require_column(name: str, text: str) -> None:
    if name in FUNCTIONS:
        raise InputError(f"expression {shown(text)}: {name} is a function, {FUNCTIONS[name]}")
    if name not in COLUMNS:
        raise InputError(f"expression {shown(text)}: unknown column {nearest(name, COLUMNS)}")


def number(node: ast.Constant, text: str) -> float:
    """The value of a constant; InputError unless it is a finite number."""
    value = node.value
    # After the tokens were checked, True, False and None are what else is a constant.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"expression {shown(text)}: {value!r} is no number and no column")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise InputError(f"expression {shown(text)} has a number beyond 1.8e308: write a smaller one")
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: the name as found, the known one nearest to it, and all that are known."""
    near = difflib.get_close_matches(name, list(known), n=1)
    suggestion = f", did you mean {near[0]}?" if near else ":"
    return f"{shown(name)}{suggestion} expected one of {', '.join(known)}"


def shown(text: str) -> str:
    """Text of a user in quotes, of at most 60 characters, control characters as escapes."""
    return repr(text if len(text) <= 60 else text[:59] + "…")
