"""Torch functions that are called by another function while a mode is active."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode


class Replaced(TorchFunctionMode):
    """While active, each torch function of `instead` is its replacement, which takes its arguments.

    Inside a replacement the mode is off, so that it may call what it replaces.
    """

    def __init__(self, instead: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.instead = instead

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.instead.get(func, func)(*args, **(kwargs or {}))
