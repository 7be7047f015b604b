"""What runs rest on, measured, planned and compared, and what they came to."""

from sift_cli.analysis.compare import compare, compare_runs
from sift_cli.analysis.plan import plan
from sift_cli.analysis.probe import probe
from sift_cli.analysis.report import report

__all__ = ["compare", "compare_runs", "plan", "probe", "report"]
