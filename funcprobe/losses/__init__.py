"""Losses that trainers minimise, as functions of per-token arrays, and the coefficients they give J."""
