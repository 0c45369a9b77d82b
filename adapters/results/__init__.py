"""What a run writes and prints: results.json, manifest.json, tables."""
