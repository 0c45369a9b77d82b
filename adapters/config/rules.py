"""Configuration of `funcprobe whatif`: the rules that it compares."""

from pydantic import Field

from .section import Section, Text


class WhatifConfig(Section):
    """The rules that `funcprobe whatif` compares with the run's own."""

    rules: tuple[Text, ...] = Field(
        (
            "positive_only",
            "negative_only",
            "advantage:mean",
            "clip",
            "clip_cov",
            "kl_cov",
            "top_entropy:0.2",
            "steer",
            "stare",
            "entropy_bonus:0.01",
            "kl_penalty:0.04",
            "mask:not (advantage < 0 and surprisal > 4)",
            "drop_tokens:0.05",
            "random_tokens:0.05",
        ),
        description='As "name" or "name:argument" (docs/rules.md); --rule and --mask replace them. Of '
        "the default list, those that a run cannot have are left out.",
    )
