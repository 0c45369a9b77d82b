"""docs/configuration.md, from the descriptions in adapters/config/: run after changing one."""

import json
from pathlib import Path
from typing import Any

from funcprobe.adapters.config.schema import Config

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """\
# Configuration

A configuration is a TOML file. Every key has a default, so that a file holds only what differs:

```console
$ funcprobe init mine.toml    # a file with every key, its default and what it means
$ funcprobe run mine.toml --set sampling.B_E=2048 --set entropy.per=sequence
```

`--set KEY=VALUE` overrides a key of the file, and may be repeated. An unknown key is rejected
with the nearest known one. "unset" is a key without a value: its description says what then holds.

A path in a file is relative to the folder of that file, `~` is the home folder; a path given with
`--set`, and the default of `run.folder`, are relative to the current directory. The configuration
that a run writes has absolute paths. `funcprobe init --from CHECKPOINT --prompts SOURCE` writes a
configuration for a checkpoint, and leaves to its sidecar what that records of the training run.

This page is generated from `adapters/config/`, where every key is documented.
"""


def page() -> str:
    """The whole page: a table for each section."""
    parts = [HEAD]
    for name, section in Config.model_fields.items():
        model: Any = section.annotation
        about = (model.__doc__ or "").strip().splitlines()[0]
        rows = [
            f"| `{key}` | {_default(field.default)} | {_cell(field.description or '')} |\n"
            for key, field in model.model_fields.items()
        ]
        parts.append(
            f"\n## {name}\n\n{about}\n\n| key | default | meaning |\n|---|---|---|\n{''.join(rows)}"
        )
    return "".join(parts)


def _default(value: Any) -> str:
    """As TOML writes it."""
    return "unset" if value is None else f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    """Plain text: what Markdown would take for a mark is escaped."""
    for mark in "\\|*<>":
        text = text.replace(mark, f"\\{mark}")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
