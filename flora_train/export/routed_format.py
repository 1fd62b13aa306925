"""Writes a routed adapter as a folder of ordinary PEFT adapters, its routers, and how tokens are routed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routed.expert_names import SHARED
from flora_train.adapters.routed.folder import FORMAT, HEAD, ROUTERS, ROUTING
from flora_train.adapters.routed.gate_parts import GatePart
from flora_train.adapters.routed.parts import Part, parts_of, routers_of
from flora_train.adapters.spec import AdapterSpec
from flora_train.export.label_names import labels_content
from flora_train.export.loadability import loadability_of
from flora_train.export.peft_format import CONFIG, WEIGHTS, check_new, export_peft
from flora_train.export.peft_forms import BaseModel, config_of, names_in_peft, tensors_of
from flora_train.runtime.atomic import temporary_folder
from flora_train.runtime.manifest import BASE_RECORD, LABELS, PEFT_WARNING

NO_TYPE = (
    "PEFT has no type for {}: the folder holds PEFT adapters, which README.md shows how to load together"
)
OF_PARTS = (CONFIG, WEIGHTS, PEFT_WARNING)
"""Files in the folder of a part."""


def export_adapter(
    bank: AdapterBank,
    name: str,
    folder: Path,
    *,
    base: BaseModel,
    own_type: bool = False,
    replace: bool = True,
) -> Path:
    """Write an adapter of any method into `folder`: a routed one as `export_routed`, all others as
    `export_peft`, which explains the arguments."""
    if bank.specs[bank.id_of(name)].is_routed:
        return export_routed(bank, name, folder, base=base, replace=replace)
    return export_peft(bank, name, folder, base=base, own_type=own_type, replace=replace)


def export_routed(
    bank: AdapterBank, name: str, folder: Path, *, base: BaseModel, replace: bool = True
) -> Path:
    """Write the parts of a routed adapter, its routers and routing.json (float32) into `folder`, all or none.

    Each part is the folder of a PEFT adapter: `expert_0` and so on, and `shared` for the layers without
    experts. base: the base model that the files name; replace: overwrite files of an earlier export. Other
    files stay. Returns the folder. Raises UserError if files cannot be written.
    """
    if not replace:
        check_new(folder)
    pool, member = bank.location[bank.id_of(name)]
    spec = pool.specs[member]
    parts, parameters = parts_of(pool, spec), bank.parameters_of(name)
    with temporary_folder(folder) as temporary:
        for part in parts:
            _write_part(bank, part, part.parameters(parameters), temporary / part.name, base)
        save_file(_on_cpu(routers_of(parameters)), temporary / ROUTERS, {"format": "pt"})
        if head := bank.head_of(name):
            save_file(_on_cpu(head), temporary / HEAD, {"format": "pt"})
        if spec.labels is not None:
            _write_json(temporary / LABELS, labels_content(spec.labels))
        if base.identity is not None:
            _write_json(temporary / BASE_RECORD, {"base": dict(base.identity)})
        (temporary / PEFT_WARNING).write_text(f"{NO_TYPE.format(spec.method)}\n", encoding="utf-8")
        _write_json(temporary / ROUTING, _routing(spec, parts, routers_of(parameters), base))
        _move(temporary, folder, replace)
    return folder


def _write_part(
    bank: AdapterBank,
    part: Part | GatePart,
    parameters: dict[str, dict[str, Tensor]],
    folder: Path,
    base: BaseModel,
) -> None:
    """The folder of a PEFT adapter."""
    folder.mkdir()
    checks = loadability_of(bank.model)
    form = checks.written(part.targets, part.spec).form
    tensors = tensors_of(parameters, part.targets, part.spec, form=form)
    save_file(_on_cpu(names_in_peft(tensors, bank.model, part.spec)), folder / WEIGHTS, {"format": "pt"})
    config = config_of(bank.model, bank.base_names(), part.targets, spec=part.spec, base=base, form=form)
    _write_json(folder / CONFIG, config)
    if (problem := checks.problem_of(folder)) is not None:
        (folder / PEFT_WARNING).write_text(f"{problem.text}\n", encoding="utf-8")


def _routing(
    spec: AdapterSpec, parts: Sequence[Part | GatePart], routers: dict[str, Tensor], base: BaseModel
) -> dict[str, Any]:
    """The content of routing.json."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "method": spec.method,
        "base_model_name_or_path": base.path,
        "revision": base.revision,
        "shared": any(part.name == SHARED for part in parts),
        "pooling": spec.pooling,
        "blocks": list(routers),
    }
    if spec.gate is not None:
        names = [member.name for member in spec.gate.members]
        return content | {"experts": len(names), "members": names, "top_k": spec.gate.top_k, "top_p": 1.0}
    experts = spec.experts
    assert experts is not None
    return content | {
        "expert": experts.method,
        "experts": experts.count,
        "top_k": experts.top_k,
        "top_p": experts.top_p,
        "balance_loss": experts.balance_loss,
        "jitter": experts.jitter,
    }


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _move(temporary: Path, folder: Path, replace: bool) -> None:
    """Move the new files into `folder`.

    If the process is killed, the folder holds the old adapter, the new one, or no routing.json, in which case
    nothing takes it for an adapter.
    """
    if not replace or not folder.exists():
        temporary.rename(folder)
        return
    (folder / ROUTING).unlink(missing_ok=True)
    for old in _written_files(folder):
        old.unlink()
    new = [file for file in _written_files(temporary) if file.name != ROUTING]
    for file in (*new, temporary / ROUTING):
        target = folder / file.relative_to(temporary)
        target.parent.mkdir(exist_ok=True)
        file.replace(target)
    for part in (*folder.glob("expert_*"), folder / SHARED):
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()


def _written_files(folder: Path) -> list[Path]:
    """The files in a folder that an export writes."""
    parts = [*folder.glob("expert_*"), folder / SHARED]
    files = [part / name for part in parts for name in OF_PARTS]
    files += [folder / name for name in (ROUTERS, HEAD, LABELS, BASE_RECORD, PEFT_WARNING, ROUTING)]
    return [file for file in files if file.is_file()]
