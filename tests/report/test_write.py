"""report.html and figures/ of a run folder."""

import pytest

from funcprobe.adapters.report import write_report
from funcprobe.types import InputError


def test_a_folder_without_a_run_is_rejected(tmp_path):
    with pytest.raises(InputError, match="give a run folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
