"""A hub on loopback for the real clients: huggingface_hub, transformers, datasets and peft.

It serves models and data sets for reading, accepts pushes, and fails when told to (faults.py). As a process
of its own: `python -m tests.hub_server FOLDER`.

client.py    points the clients of a test at the hub
storage.py   repositories, their files and commits
faults.py    the failures that can be injected
handler.py   dispatch of a request: faults, tokens, endpoints
reading.py   endpoints that read: repository information, trees, files with ranges
pushing.py   endpoints that write: repositories, LFS uploads, commits, collections
"""

from tests.hub_server.faults import Fault, all_faults
from tests.hub_server.handler import serve
from tests.hub_server.storage import ME, OTHERS, STRANGER, TOKEN, Hub, Repo

__all__ = ["ME", "OTHERS", "STRANGER", "TOKEN", "Fault", "Hub", "Repo", "all_faults", "serve"]
