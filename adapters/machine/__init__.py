"""The computer and what a run takes of it: device, memory, allocator, precision, cost, versions."""
