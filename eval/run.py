"""The command `flora-train solve`, for accelerate's launcher.

Usage: accelerate launch eval/run.py run=outputs/NAME [evaluation.KEY=VALUE ...] \\
    [--languages lua,pl] [--contenders PEFT,...]
"""

import sys

from flora_train.__main__ import start

if __name__ == "__main__":
    run = [word.removeprefix("run=") for word in sys.argv[1:] if word.startswith("run=")]
    start(["solve", *run, *(word for word in sys.argv[1:] if not word.startswith("run="))])
