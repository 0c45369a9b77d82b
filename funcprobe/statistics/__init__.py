"""Estimators on arrays: entropy, its change, derivatives, baselines, intervals; no model in sight."""
