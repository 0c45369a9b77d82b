"""JSON schemas of what is written: python -m funcprobe.adapters.results docs"""

import argparse
import json
from pathlib import Path

from .comparison_sections import Comparison
from .manifest import Manifest
from .quantity import Section
from .schema import Results
from .whatif_sections import WhatIf

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schemas() -> dict[str, str]:
    """File name -> JSON schema (draft 2020-12), as text."""
    models: dict[str, type[Section]] = {
        "results.schema.json": Results,
        "manifest.schema.json": Manifest,
        "whatif.schema.json": WhatIf,
        "compare.schema.json": Comparison,
    }
    return {
        name: json.dumps({"$schema": DIALECT} | model.model_json_schema(mode="serialization"), indent=2)
        + "\n"
        for name, model in models.items()
    }


def main() -> None:
    """Write them into a folder."""
    parser = argparse.ArgumentParser(prog="python -m funcprobe.adapters.results", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write, as docs")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder: give one that exists")
    for name, text in schemas().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(f"wrote {folder / name}")


if __name__ == "__main__":
    main()
