"""How long threads wait for each other before they sleep."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from sift_cli.cli import main
sys.argv = ["sift", "recipes"]
try:
    main()
finally:
    print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules)
"""


@pytest.mark.parametrize(("given", "there"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_a_command_says_it_before_torch_is_imported(given: dict[str, str], there: str) -> None:
    plain = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=plain | given, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == f"{there} False", done.stderr
