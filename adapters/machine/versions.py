"""Versions of the packages that the numbers depend on."""

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
    return {name: metadata.version(name) for name in PACKAGES}
