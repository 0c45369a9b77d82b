"""A finished run as other programs show it: TensorBoard, Weights & Biases, Trackio."""

from .registry import require, send

__all__ = ["require", "send"]
