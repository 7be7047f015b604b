"""`sift ARGS`, to which a signal is sent amid a training step; of ranks, to all but the first.

usage: dying.py STEP SIGNAL ARGS...
"""

import os
import sys

from sift_cli.cli import main
from tests.support.interruptions import at_call, signalled

if __name__ == "__main__":
    step, number, *words = sys.argv[1:]
    sys.argv = ["sift", *words]
    with at_call(10**6 if os.environ.get("RANK") == "0" else int(step), signalled(int(number))):
        main()
