"""Archives that are larger in memory than on disk are refused before anything in them is read."""

import zipfile
from copy import copy
from io import BytesIO

import torch

from funcprobe.adapters.machine.archives import why_not_plain


def archive(copies: int, kind: int = zipfile.ZIP_STORED) -> BytesIO:
    """One part of a thousand bytes, under so many names."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w", kind) as parts:
        parts.writestr("a", bytes(1000))
        for i in range(1, copies):
            other = copy(parts.infolist()[0])
            other.filename = f"a{i}"
            parts.filelist.append(other)
    return file


def test_parts_that_share_their_bytes() -> None:
    assert why_not_plain(archive(1)) is None
    assert "lie on one another" in (why_not_plain(archive(2)) or "")


def test_a_compressed_part() -> None:
    assert "has a compressed part, a," in (why_not_plain(archive(1, zipfile.ZIP_DEFLATED)) or "")


def test_what_torch_writes_and_what_is_no_archive() -> None:
    file = BytesIO()
    torch.save({"a": torch.ones(1000)}, file)
    assert why_not_plain(file) is None
    assert why_not_plain(BytesIO(b"no archive")) is None
