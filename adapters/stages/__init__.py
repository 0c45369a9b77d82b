"""The stages of a run between configuration and results, each kept on disk."""
