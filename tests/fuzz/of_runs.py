"""The documents and tables of a run folder, as `report`, `compare` and a notebook read them."""

import io
import json
import shutil
import tempfile
import tomllib
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from funcprobe.adapters.compare import compare_runs
from funcprobe.adapters.report import charts
from funcprobe.adapters.report.causes import causes
from funcprobe.adapters.report.curve import curve
from funcprobe.adapters.report.headline import headline
from funcprobe.adapters.report.page import report_html
from funcprobe.adapters.report.responses import responses
from funcprobe.adapters.report.rules import comparing, rules
from funcprobe.adapters.report.trust import trust
from funcprobe.adapters.results.comparison_words import print_comparison
from funcprobe.adapters.results.frames import FRAMES
from funcprobe.adapters.results.saved import SavedRun, load_run
from funcprobe.adapters.results.tables import print_results
from funcprobe.adapters.results.whatif_table import print_whatif
from funcprobe.types import InputError

from .codecs import json_text, toml_text
from .target import Target

View = Callable[[SavedRun], object]
Seeds = Callable[[], Sequence[bytes]]
RULES = "one.whatif.json"
MEMORY = 256 << 20  # bytes beside four times the file: what altair and pandas take, once


@cache
def _run() -> Path:
    """The folder of a run, made once: results.json, manifest.json and what lies beside them."""
    from support.checkpoints import make_checkpoint
    from support.saved_runs import run_of

    place = Path(tempfile.mkdtemp(prefix="fuzz-run-"))
    return run_of(make_checkpoint(place / "checkpoint"), place)


def _console() -> Console:
    return Console(file=io.StringIO(), width=80, highlight=False)


def _printed(run: SavedRun) -> None:
    for verbose in (False, True):
        print_results(run.results, _console(), verbose=verbose)


def _printed_rules(run: SavedRun) -> None:
    for verbose in (False, True):
        if run.whatif is not None:
            print_whatif(run.whatif, _console(), verbose=verbose)


def _compared(run: SavedRun) -> None:
    """With the run as it was."""
    out = run.folder.parent / "out"
    out.mkdir(exist_ok=True)
    written = compare_runs([run.folder, _run()], out)
    print_comparison(written.comparison, _console())


def _tables(run: SavedRun) -> None:
    for name in FRAMES:
        run.to_pandas(name)


def _sections(run: SavedRun) -> None:
    for part in (headline, curve, causes, rules, comparing, trust):
        part(run)


VIEWS: tuple[View, ...] = (
    *(_printed, _printed_rules, _compared, _tables, _sections, responses),
    lambda run: run._repr_html_(),
    lambda run: report_html(run, {}),
    *charts.CHARTS,
)


def _read(name: str, views: Sequence[View] = VIEWS) -> Any:
    """The folder with the data in place of one of its files, by one of the views, as the data draw it.

    All of them take seconds, in which a fuzzer tries little.
    """

    def read(data: bytes, folder: Path) -> None:
        target = folder / "one"
        if not target.is_dir():
            shutil.copytree(_run(), target)
            shutil.copy(_run().with_name(RULES), folder)
        path = folder / name
        before = path.read_bytes()
        path.write_bytes(data)
        try:
            run = load_run(target)
            if name == RULES and run.whatif_left_out is not None:
                raise InputError(run.whatif_left_out)
            views[zlib.crc32(data) % len(views)](run)
        finally:
            path.write_bytes(before)

    return read


def _parquet(rows: Any, schema: pa.Schema) -> bytes:
    """Columns of the types that a run writes where the values have them."""
    records = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in records for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in records]
        kinds = [schema.field(name).type] if name in schema.names else []
        columns[name] = _column(values, [*kinds, None])
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def _column(values: list[Any], kinds: Sequence[pa.DataType | None]) -> pa.Array:
    for kind in kinds:
        try:
            return pa.array(values, type=kind)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            continue
    return pa.array([json.dumps(value) for value in values])


def _table(name: str) -> list[Target]:
    """Of eight rows of each batch, so that most changes are of a column or of a value of one."""

    @cache
    def table() -> pa.Table:
        found: pa.Table = pq.read_table(_run().parent / name)
        return found

    def seeds() -> list[bytes]:
        return [json.dumps(table().to_pylist()[:8]).encode(), json.dumps(table().to_pylist()).encode()]

    def files() -> list[bytes]:
        return [(_run().parent / name).read_bytes()]

    def encode(value: Any) -> bytes:
        return _parquet(value, table().schema)

    return _both(name, seeds, encode, files)


def _document(name: str, value: Callable[[str], Any], encode: Callable[[Any], bytes]) -> list[Target]:
    def seeds() -> list[bytes]:
        return [json.dumps(value((_run().parent / name).read_text("utf-8"))).encode()]

    def files() -> list[bytes]:
        return [(_run().parent / name).read_bytes()]

    return _both(name, seeds, encode, files)


def _both(name: str, seeds: Seeds, encode: Callable[[Any], bytes], files: Seeds) -> list[Target]:
    read, of_bytes = _read(name), f"{name}:bytes"
    return [Target(name, read, seeds, encode, MEMORY), Target(of_bytes, read, files, None, MEMORY)]


def targets() -> list[Target]:
    return [
        *_document("one/results.json", json.loads, json_text),
        *_document("one/manifest.json", json.loads, json_text),
        *_document(RULES, json.loads, json_text),
        *_document("one/config.toml", tomllib.loads, toml_text),
        *(
            target
            for name in ("modules", "sequences", "tokens", "rollouts/update", "rollouts/eval")
            for target in _table(f"one/{name}.parquet")
        ),
    ]
