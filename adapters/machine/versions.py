"""Versions of the packages that the numbers depend on."""

from functools import cache
from importlib import metadata

PACKAGES = (
    "funcprobe",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "optree",
    "safetensors",
    "numpy",
    "scipy",
    "arviz-stats",
    "pyarrow",
)


def versions() -> dict[str, str]:
    """Versions of the packages the numbers depend on."""
    return {name: _version(name) for name in PACKAGES}


@cache
def _version(package: str) -> str:
    """Parsed from its whole metadata, the README among them."""
    return metadata.version(package)
