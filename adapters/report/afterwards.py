"""The report of a run folder that another command has just written."""

from pathlib import Path

from funcprobe.types import InputError

from ..console import Narrator
from .write import write_report


def report_afterwards(folder: Path, narrator: Narrator) -> None:
    """`write_report` as a stage; what stops it says that the run itself is whole.

    Raises InputError for a full disk. An interrupt passes on, after a line.
    """
    again = f"{folder} is whole but for its report: funcprobe report {folder} writes it"
    try:
        with narrator.phase("report"):
            write_report(folder)
    except OSError as error:
        raise InputError(f"{error.strerror or error}; {again}") from error
    except KeyboardInterrupt:
        narrator.say(again)
        raise
