"""All that is slow to import, for the process that `forks` forks others from."""
# ruff: noqa: F401

import datasets
import torch.distributed.fsdp
import tqdm

import sift_cli.analysis.adapted
import sift_cli.analysis.plots
import sift_cli.analysis.report
import tests.support.ranks
import tests.support.sharded

# A lock that forked processes share: if each made its own, those that are killed would leave it.
tqdm.tqdm.get_lock()
