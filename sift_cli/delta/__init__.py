"""The change as a file, and on a model in memory."""

from sift_cli.delta.attached import delta_of
from sift_cli.delta.file import Delta, WeightDelta, load_delta, save_delta
from sift_cli.delta.serving import apply_, apply_delta, swap_, undo_

Delta.apply_, Delta.undo_, Delta.swap_ = apply_, undo_, swap_
Delta.of = staticmethod(delta_of)

__all__ = ["Delta", "WeightDelta", "apply_delta", "load_delta", "save_delta"]
