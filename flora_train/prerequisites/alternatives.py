"""What runs on this machine instead, without hub, token and GPU."""

from __future__ import annotations

from collections.abc import Sequence

from flora_train.config.paths import exists, find_file
from flora_train.config.schema import RunConfig
from flora_train.prerequisites.needs import Need, learnt_tasks
from flora_train.runtime.hub_snapshot import is_offline

BUILT = {
    "multipl_e_local": {"setup": "assets/models/smollm2-135m", "code-local": "assets/code_local"},
    "speech_local": {"speech-local": "assets/speech_local"},
}
"""Recipe -> the make targets that build what it needs, and the folder that each builds."""


def what_runs_instead(config: RunConfig, needs: Sequence[Need]) -> str | None:
    """One line on what can be run here; None if this is the run that would be suggested."""
    tasks = learnt_tasks(config).values()
    if any(task.speech is not None for task in tasks):
        recipe = "speech_local"
    elif any(task.language is not None for task in tasks):
        recipe = "multipl_e_local"
    else:
        return _with_other_rows(needs)
    if config.name == recipe:
        return None
    targets = [target for target, folder in BUILT[recipe].items() if not exists(find_file(folder))]
    command = f"flora-train train recipe={recipe}"
    if targets:
        command = f"make {' '.join(targets)} && {command}"
    return f"what runs here instead: {command}"


def _with_other_rows(needs: Sequence[Need]) -> str | None:
    """What replaces the rows of a recipe of any other kind. Offline, the problems say it themselves."""
    if is_offline():
        return None
    hints = list(dict.fromkeys(need.fallback_hint for need in needs if need.fallback_hint))
    if hints:
        return f"what runs here instead: {', or '.join(hints)}"
    return "what runs here instead: flora-train train recipe=quickstart, or files of your own (docs/data.md)"
