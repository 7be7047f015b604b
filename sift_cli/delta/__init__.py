"""The change as a file: format, apply and undo, streaming merge."""

from sift_cli.delta.apply import apply_delta
from sift_cli.delta.file import Delta, WeightDelta, load_delta, save_delta

__all__ = ["Delta", "WeightDelta", "apply_delta", "load_delta", "save_delta"]
