"""What is written and printed: results.json, manifest.json and whatif.json as typed objects, tables."""

from .manifest import Manifest
from .reading import load, load_manifest, load_whatif
from .schema import Results
from .whatif_sections import WhatIf

__all__ = ["Manifest", "Results", "WhatIf", "load", "load_manifest", "load_whatif"]
