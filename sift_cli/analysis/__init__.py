"""What runs rest on, measured."""

from sift_cli.analysis.probe import probe

__all__ = ["probe"]
