"""The stages of a run between configuration and results, each stored on disk."""
