"""What is written and printed: results.json, manifest.json and whatif.json as typed objects, tables."""

from .manifest import Manifest
from .reading import load, load_manifest, load_whatif
from .schema import Results
from .verdict import verdict_line, verdict_of
from .verdict_sections import Verdict
from .whatif_sections import WhatIf

__all__ = [
    "Manifest",
    "Results",
    "Verdict",
    "WhatIf",
    "load",
    "load_manifest",
    "load_whatif",
    "verdict_line",
    "verdict_of",
]
