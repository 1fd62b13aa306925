"""recipe=multipl_e against a hub that fails in every way that a reader can survive."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.headline.conftest import add_repositories
from tests.headline.runs import CODE_SIZES, done, figures, hub_environment, launched
from tests.hub_server import serve
from tests.hub_server.faults import all_faults

pytestmark = pytest.mark.full
SIZES = (*CODE_SIZES, "training.steps=6")
OF_THE_CLIENT = ("Retrying in", "HTTP Error", "Trying to resume", "Rate limited", "thrown while requesting")
"""Parts of the lines that the hub's client logs about its own attempts."""


def test_a_run_with_every_fault_of_the_hub_ends_with_the_figures_of_one_without(
    code_material: Path, tmp_path: Path
) -> None:
    runs = {}
    for name, faults in (("without", []), ("with", ["all"])):
        folder = tmp_path / name
        folder.mkdir()
        with serve() as hub:
            add_repositories(hub, code_material)
            hub.add_faults(*faults)
            environment = hub_environment(hub.url, folder / "home")
            ended = done(launched("multipl_e", folder / "run", *SIZES), environment, timeout=900)
            assert ended.returncode == 0, ended.stderr
            runs[name] = figures(folder / "run")
            injected = dict(hub.injected)
        lines = ended.stderr.splitlines()
        assert not [line for line in lines if any(part in line for part in OF_THE_CLIENT)]
    assert injected.keys() == {fault.kind for fault in all_faults()}
    assert "the hub answered 503; trying again in 1s" in ended.stderr
    assert runs["with"] == runs["without"]
