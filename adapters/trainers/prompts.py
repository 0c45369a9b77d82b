"""The prompts of a running trainer: its own data set, as it renders and tokenises them."""

from typing import Any

from funcprobe.types import InputError

from ..config.schema import Config
from ..sampling.large import LARGE, LargeRows, OfDataset
from ..sampling.messages import as_messages
from ..sampling.sources import Row


def own_prompts(trainer: Any, config: Config) -> tuple[Config, list[Row] | LargeRows | None]:
    """The configuration with which prompts are the run's, and the rows of the trainer's train_dataset.

    Very many rows are read as they are drawn.

    As the GRPOTrainer of TRL 1.16 (`_tokenize_prompts`): messages by its chat template, with its
    arguments and tools; text as it is, with the tokenizer's special tokens, whatever it begins with.
    The configuration as it is and None if prompts.source is set, or E is supplied. InputError for a
    data set whose rows cannot be counted, or without the column of prompts.
    """
    chosen = config.prompts
    if chosen.source != "toy" or config.rollouts.eval is not None:
        return config, None
    dataset, remedy = trainer.train_dataset, "set prompts.source to the prompts"
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InputError(
            f"prompts.source is not set, and the trainer's data set is {type(dataset).__name__}, from "
            f"which prompts cannot be drawn: {remedy}"
        )
    unread = ("tools", "chat_template_kwargs")  # by that trainer, which has its own
    found = OfDataset(dataset, unread)
    rows = found if len(found) > LARGE else found.take(range(len(found)))
    first = found.take([0])[0] if len(found) else {}
    if chosen.prompt_column not in first:
        raise InputError(
            "prompts.source is not set, and the trainer's data set has no column "
            f"{chosen.prompt_column!r} (its columns: {', '.join(sorted(first))}): "
            f"{remedy}"
        )
    changes: dict[str, Any] = {}
    if as_messages(first[chosen.prompt_column], "the trainer's data set") is None:
        if chosen.chat == "auto":
            changes = {"chat": False}
            if chosen.add_special_tokens is None:
                changes |= {"add_special_tokens": True}
    else:
        own = {
            "chat_template": getattr(trainer, "chat_template", None),
            "tools": getattr(trainer, "tools", None) or None,
            **(getattr(trainer, "chat_template_kwargs", None) or {}),
        }
        changes = {"chat_template_kwargs": own | chosen.chat_template_kwargs}
    return config.model_copy(update={"prompts": chosen.model_copy(update=changes)}), rows
