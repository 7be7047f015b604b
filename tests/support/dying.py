"""A training of which the second process is killed amid its third step."""

import os
import sys
from pathlib import Path
from signal import SIGKILL

from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe
from sift_cli.training import train
from tests.support.interruptions import at_call


def main(recipe: str, out: str) -> None:
    """Trains; a checkpoint after the second step is whole."""
    call = 3 if os.environ["RANK"] == "1" else 10**6
    try:
        with at_call(call, lambda: os.kill(os.getpid(), SIGKILL)):
            train(load_recipe(Path(recipe), ["checkpoint.every=2"]), Path(out))
    except SiftError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.code))


if __name__ == "__main__":
    main(*sys.argv[1:])
