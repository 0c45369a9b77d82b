"""Estimators on arrays, independent of any model: entropy, its change, derivatives, intervals."""
