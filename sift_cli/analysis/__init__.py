"""What runs rest on, measured, planned and compared."""

from sift_cli.analysis.compare import compare, compare_runs
from sift_cli.analysis.plan import plan
from sift_cli.analysis.probe import probe

__all__ = ["compare", "compare_runs", "plan", "probe"]
