"""The computer and its use by a run: device, memory, allocator, precision, cost, versions."""
