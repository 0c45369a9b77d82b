"""What to call a prompt by: its question, without what all prompts have around it."""

import itertools
from typing import TYPE_CHECKING

from ..console import excerpt

if TYPE_CHECKING:
    from ..rollouts import Rollouts
    from ..sampling.prompts import Prompt
    from ..stages.plan import Plan

LONGEST = 40  # characters of a prompt in a sentence, as `excerpt` writes them


def prompt_texts(plan: "Plan", batch: "Rollouts", supplied: bool) -> dict[int, str]:
    """Prompt index -> its text: the last user message, or the text as given to the policy.

    Of supplied rollouts, whose prompts are known as rendered text alone, without the lines that all of
    them begin and end with.
    """
    if not supplied:
        return {i: _question(plan.prompts[i]) for i in set(batch.prompt_index)}
    found: dict[int, str] = {}
    for i, text, ids in zip(batch.prompt_index, batch.prompt, batch.prompt_ids, strict=True):
        if i not in found:
            found[i] = text or str(plan.policy.tokenizer.decode(ids))
    return without_common(found)


def without_common(found: dict[int, str]) -> dict[int, str]:
    """Texts without the lines that all of them begin and end with, at least one of each being left."""
    lines = [text.split("\n") for text in found.values()]
    if len(set(found.values())) == 1:
        return found
    start = _alike(lines)
    end = _alike([each[:start:-1] for each in lines])  # one line of each is left
    kept = [each[start : len(each) - end] for each in lines]
    return {i: "\n".join(each) for i, each in zip(found, kept, strict=True)}


def shortened(text: str) -> str:
    """Of at most about 40 characters on one line in quotes; nothing in it is obeyed by a terminal."""
    return excerpt(" ".join(text.split()), beginning=LONGEST - 10, end=10)


def _question(prompt: "Prompt") -> str:
    for message in reversed(prompt.messages or []):
        if message.get("role") == "user":
            return str(message.get("content"))
    return prompt.given if isinstance(prompt.given, str) else prompt.text


def _alike(lists: list[list[str]]) -> int:
    """Leading entries that all lists have in common."""
    together = zip(*lists, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda entries: len(set(entries)) == 1, together))
