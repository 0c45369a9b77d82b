"""Folders of the repository, wherever a test of it stands."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"  # beside the repository, where it has been laid
