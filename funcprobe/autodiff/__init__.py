"""Derivatives of torch functions, independent of any model: forward mode, Taylor mode, attention."""
