"""The zip archives that torch.save writes: nothing in them is compressed."""

import zipfile
from pathlib import Path
from typing import IO


def why_not_plain(file: Path | IO[bytes]) -> str | None:
    """Why torch must not read an archive, which would be larger in memory; None for any other file.

    torch.save stores its parts as they are. A compressed one, or parts that lie on one another, can
    be a thousand times as large as the file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
            if packed:
                return f"has a compressed part, {packed[0]:.80}, as torch.save writes none"
            end = archive.start_dir  # of the parts; its directory comes after them
    # Not an archive, damaged, or of a kind that is unknown here: the reader's own error says what.
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, UnicodeDecodeError):
        return None
    if sum(part.file_size for part in parts) > end:
        return "has parts that lie on one another, larger together than the file"
    return None
