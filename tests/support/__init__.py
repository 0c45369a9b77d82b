"""What tests share: policies, checkpoints, trainings, and how commands end."""

from pathlib import Path

import pytest

import funcprobe.adapters  # noqa: F401 (before peft imports bitsandbytes, whose line it leaves out)

# Their assertions show what they compared, as those of tests do.
pytest.register_assert_rewrite(
    *(f"support.{path.stem}" for path in Path(__file__).parent.glob("[!_]*.py"))
)
