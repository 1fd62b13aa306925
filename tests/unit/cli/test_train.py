"""The train command says what it will do before it loads torch, which takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.e2e.conftest import ROOT

PROGRAM = """
import logging, os, sys

class First(logging.Handler):
    def emit(self, record):
        heavy = {"torch", "transformers", "matplotlib"} & set(sys.modules)
        print(record.getMessage(), sorted(heavy), flush=True)
        os._exit(0)

logging.getLogger("flora_train").addHandler(First())
logging.getLogger("flora_train").setLevel(logging.INFO)
from flora_train.__main__ import start
start(["train", "recipe=quickstart", "output_dir=outputs/first"])
"""


def test_the_first_line_is_printed_before_torch_loads() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    line = "quickstart: 3 tasks, base assets/models/smollm2-135m, run folder outputs/first []\n"
    assert done.stdout == line, done.stderr
