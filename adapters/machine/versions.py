"""Versions of the packages that the numbers depend on."""

from functools import cache
from importlib import metadata

import torch

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
    return {name: version(name) for name in PACKAGES}


@cache
def version(package: str) -> str:
    """Of an installed package; torch's with its build, as 2.13.0+cu130, which PyPI's metadata lacks."""
    # Metadata is parsed as a whole, the README in it.
    return str(torch.__version__) if package == "torch" else metadata.version(package)
