"""Writes the versions of TRL and of the packages that its results depend on."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

request = json.loads(Path(sys.argv[1]).read_text())
names = ("trl", "transformers", "torch", "peft")
Path(request["json"]).write_text(json.dumps({name: version(name) for name in names}))
