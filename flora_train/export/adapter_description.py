"""What the files in an exported folder say of the adapter: of a PEFT adapter, or of a routed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flora_train.adapters.peft_config import CONFIG
from flora_train.adapters.routed.expert_names import expert_name
from flora_train.adapters.routed.folder import ROUTING, is_routed_folder
from flora_train.config.errors import user_error
from flora_train.config.json_format import read_object

ROUTED = "routing"
"""Key of a routed adapter's description: the content of its routing.json."""


def description_of(folder: Path, hint: str = "export it again") -> dict[str, Any]:
    """The content of adapter_config.json; of a routed adapter that of its first expert, with its method as
    peft_type and the content of routing.json as ROUTED.

    Raises UserError, with this hint, where a file is missing or damaged.
    """
    routing = None
    path = folder / CONFIG
    if is_routed_folder(folder):
        path = folder / expert_name(0) / CONFIG
        routing = read_object(folder / ROUTING, hint)
    content: dict[str, Any] = {"task_type": None, **read_object(path, hint)}
    for name in ("base_model_name_or_path", "peft_type"):
        if not isinstance(content.get(name), str):
            raise user_error(str(path), None, f"is damaged: {hint}")
    if routing is not None:
        content |= {"peft_type": str(routing.get("method")).upper(), ROUTED: routing}
    return content


def config_files(folder: Path) -> list[Path]:
    """The files in an exported folder that name the base model."""
    return [
        file
        for file in (folder / ROUTING, folder / CONFIG, *sorted(folder.glob(f"*/{CONFIG}")))
        if file.is_file()
    ]
