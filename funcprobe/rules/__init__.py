"""Other rules for the step on the same batches: J with other coefficients of l and h."""
