"""The loop."""

from sift_cli.training.loop import train

__all__ = ["train"]
