"""Deltas and model folders made from each other: merge, undo, difference, export."""
