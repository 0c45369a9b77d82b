"""What a run writes and prints: results.json and manifest.json as typed objects, tables."""

from .manifest import Manifest
from .reading import load, load_manifest
from .schema import Results

__all__ = ["Manifest", "Results", "load", "load_manifest"]
