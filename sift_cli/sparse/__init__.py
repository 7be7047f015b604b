"""What is trained: supports, their fp32 masters in one flat buffer, and the step over them."""

from sift_cli.sparse.optimizer import SparseAdamW
from sift_cli.sparse.parameters import SparseParameters, attach
from sift_cli.sparse.support import Support
from sift_cli.sparse.touched import Touched

__all__ = ["SparseAdamW", "SparseParameters", "Support", "Touched", "attach"]
