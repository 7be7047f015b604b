"""Deltas and model folders made from each other: merge, undo, difference, export."""

from sift_cli.convert.merge import merge

__all__ = ["merge"]
