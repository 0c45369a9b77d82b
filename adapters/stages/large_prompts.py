"""Prompts of very many rows: those that are drawn are read, rendered, encoded and checked."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, overload

from funcprobe.types import InputError

from ..sampling.large import LargeRows
from ..sampling.prompts import Prompt
from ..sampling.sources import Row

T = TypeVar("T")

FIRST = 64  # rows by which it is known what all have to be
CHUNK = 1024  # rows at once, of all


class Made(NamedTuple):
    """Prompts of some rows, their token ids, and lines for the log."""

    prompts: Sequence[Prompt]
    ids: Sequence[list[int]]
    lines: list[str]


class Drawn(Sequence[T]):
    """As long as the data set, of which the entries that were drawn are known."""

    def __init__(self, known: Mapping[int, T], population: int) -> None:
        self._known, self._population = known, population

    def __len__(self) -> int:
        return self._population

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> list[T]: ...

    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self._known[i] for i in range(*place.indices(self._population))]
        return self._known[place]

    @property
    def known(self) -> list[T]:
        """The entries that were drawn."""
        return list(self._known.values())


def known(prompts: Sequence[T]) -> Sequence[T]:
    """The entries that can be read: those that were drawn, of `Drawn`; none of `LargePrompts`."""
    if isinstance(prompts, LargePrompts):
        return []
    return prompts.known if isinstance(prompts, Drawn) else prompts


def taken(prompt_ids: Sequence[list[int]], index: Sequence[int]) -> list[list[int]]:
    """Token ids of the prompts at these places."""
    if isinstance(prompt_ids, LargePrompts):
        return prompt_ids.ids(index)
    return [prompt_ids[i] for i in index]


class LargePrompts(Sequence[list[int]]):
    """Token ids of the prompts of rows that are read as they are asked for, and not kept.

    All are to be of the kind of the first ones: text or messages, rendered by the chat template or
    taken as they are. InputError for others, as they are read.
    """

    def __init__(
        self,
        rows: LargeRows,
        where: str,
        make: Callable[[Sequence[Row], Sequence[int]], Made],
    ) -> None:
        self._rows, self._where, self._make = rows, where, make
        first = self._of(range(min(FIRST, len(rows))))
        self._kind = _kind(first.prompts[0])
        self.lines = [
            f"prompts: {len(rows):,} rows, of which those that are drawn are read and checked",
            *first.lines,
        ]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> list[int]: ...

    @overload
    def __getitem__(self, place: slice) -> list[list[int]]: ...

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.ids(range(*place.indices(len(self))))
        return self.ids([place])[0]

    def ids(self, index: Sequence[int]) -> list[list[int]]:
        """Token ids at these places."""
        found = self.take(index)
        return [found[i][1] for i in index]

    def take(self, index: Iterable[int]) -> dict[int, tuple[Prompt, list[int]]]:
        """Prompts and token ids by their places."""
        places = sorted(set(index))
        made = self._of(places)
        for i, prompt in zip(places, made.prompts, strict=True):
            if _kind(prompt) != self._kind:
                raise InputError(
                    f"row {i + 1} of {self._where} is {_kind(prompt)}, the first are {self._kind}: "
                    "prompts of one kind are expected; set prompts.chat, or drop the row"
                )
        return dict(zip(places, zip(made.prompts, made.ids, strict=True), strict=True))

    def every(self) -> Iterator[Sequence[list[int]]]:
        """Token ids of all rows, some at once."""
        for start in range(0, len(self), CHUNK):
            yield self._of(range(start, min(start + CHUNK, len(self)))).ids

    def _of(self, places: Sequence[int]) -> Made:
        try:
            return self._make(self._rows.take(places), [i + 1 for i in places])
        except InputError as error:
            if not str(error).startswith("prompt "):
                raise
            raise InputError(
                f"{error} (of the {len(places)} rows of {self._where} that were read)"
            ) from error


def _kind(prompt: Prompt) -> str:
    given = "text" if isinstance(prompt.given, str) else "messages"
    return f"{given} taken as it is" if prompt.messages is None else f"{given} to be rendered"
