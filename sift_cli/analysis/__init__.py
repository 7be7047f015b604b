"""What runs rest on, measured and planned."""

from sift_cli.analysis.plan import plan
from sift_cli.analysis.probe import probe

__all__ = ["plan", "probe"]
