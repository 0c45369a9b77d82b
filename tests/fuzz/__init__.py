"""Fuzzing of every parser: hostile bytes and hostile structures, and what a parser may do with them.

`python -m tests.fuzz --list` names the targets, `python -m tests.fuzz TARGET --seconds 600` runs one.
"""
