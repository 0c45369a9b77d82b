"""A mode that replaces torch functions while it is active."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode


class Replaced(TorchFunctionMode):
    """While active, a call of a key of `instead` goes to its value, with the same arguments.

    Inside a replacement the mode is off, so that it may call the original function.
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
