"""What is written and printed: results, manifest, rules and comparisons as typed objects, tables."""

from .comparison_sections import Comparison
from .manifest import Manifest
from .prompt_table import prompt_table
from .proxy_table import ProxyTable, proxy_table
from .reading import load, load_comparison, load_manifest, load_whatif
from .sampling_facts import BatchFacts, SamplingFacts, Spread, sampling_facts
from .saved import SavedRun, load_run
from .schema import Results
from .whatif_sections import WhatIf

__all__ = [
    "BatchFacts",
    "Comparison",
    "Manifest",
    "ProxyTable",
    "Results",
    "SamplingFacts",
    "SavedRun",
    "Spread",
    "WhatIf",
    "load",
    "load_comparison",
    "load_manifest",
    "load_run",
    "load_whatif",
    "prompt_table",
    "proxy_table",
    "sampling_facts",
]
