"""Computations that need the model, one microbatch at a time: statistics, gradients, tangents."""
