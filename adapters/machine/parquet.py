"""Parquet as every reader here takes it: of the size that its file allows, and valid in every value."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

VALUES, MOST_VALUES = 100, 1_000_000  # for each byte of the file; beside them
PARTS = 100_000  # columns, or groups of rows; a file that claims more is given no memory for them
EXPANSION, MOST_BYTES = 200, 1 << 28  # of compressed pages, likewise


def read(path: Path) -> pa.Table:
    """The table of a file. ValueError, with a reason in one line, for one that is damaged, that is far
    larger in memory than on disk, or has a value that is none of its type, as text that is not UTF-8.
    """
    try:
        with opened(path) as file:
            return checked(file.read())
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error


def opened(path: Path) -> pq.ParquetFile:
    """The file, to be read in parts, each of which `checked` looks at; ValueError as `read`.

    A column of one value, repeated a billion times, takes a few bytes.
    """
    try:
        file = pq.ParquetFile(path, memory_map=True, thrift_container_size_limit=PARTS)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
    found, size = file.metadata, path.stat().st_size
    # Not of its columns: of a damaged one pyarrow 26 ends the process (RowGroupMetaData.column).
    values = found.num_rows * max(1, found.num_columns)
    groups = (found.row_group(i) for i in range(found.num_row_groups))
    unpacked = sum(group.total_byte_size for group in groups)
    if values > VALUES * size + MOST_VALUES or unpacked > EXPANSION * size + MOST_BYTES:
        raise ValueError(f"its {size:,} bytes claim {values:,} values, {unpacked:,} bytes in memory")
    return file


def checked(table: pa.Table | pa.RecordBatch) -> pa.Table | pa.RecordBatch:
    """The table, or a batch of its rows. pyarrow's ArrowInvalid for values that are none."""
    table.validate(full=True)
    return table
