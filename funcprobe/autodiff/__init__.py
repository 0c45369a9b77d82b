"""Derivatives of torch functions, without a model in sight: forward mode, Taylor mode, attention."""
