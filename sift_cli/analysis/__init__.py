"""What runs rest on, measured, and what they came to."""

from sift_cli.analysis.probe import probe
from sift_cli.analysis.report import report

__all__ = ["probe", "report"]
