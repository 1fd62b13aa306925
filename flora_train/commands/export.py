"""flora-train export: hand a run's adapters to other programs, as PEFT folders, as plain models, or as the LoRA that is closest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.base import ConfigModel, PathText
from flora_train.config.command_options import read_options
from flora_train.config.errors import user_error
from flora_train.config.terminal_text import in_cell, print_plain, print_table
from flora_train.evaluation.report.files import read_report_if_any
from flora_train.evaluation.report.types import Report
from flora_train.export.merge import save_merged
from flora_train.export.model_card import write_card
from flora_train.export.peft_format import check_new, export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.export.svd_lora import SvdLora, compute_svd_lora, write_into
from flora_train.export.usage_snippet import generation_example
from flora_train.final_evaluation import heldout_losses
from flora_train.models.loading import load_base_model, load_model_config, load_preprocessors
from flora_train.run_context import RunContext, load_run, locked, note_differences
from flora_train.runtime.atomic import check_writable, real_path
from flora_train.runtime.manifest import PEFT_FILES, PEFT_WARNING
from flora_train.runtime.progress import ProgressBar
from flora_train.runtime.run_folder import open_run
from flora_train.training.origin import OriginOptions

FOLDERS = {"peft": "adapters", "flora": "flora", "merged": "merged", "lora-svd": "lora-svd"}
"""What an adapter is written as -> where, in the run's folder."""
RANK = 64
"""Of a lora-svd that nothing is said of: the most that vLLM takes without being told (max_lora_rank) is 16, and can be told."""


class ExportOptions(ConfigModel):
    as_: Literal["peft", "flora", "merged", "lora-svd"] = Field("peft", alias="as")
    """peft: what PEFT calls it (LORA, IA3, HIRA for fLoRA), exactly. flora: fLoRA under a type of its own, without HiRA's extra rank, for peft with
    flora_train.peft_plugin. merged: a plain model with the adapter folded in, in float32. lora-svd: the
    closest LoRA, for servers that take nothing else."""
    rank: int | None = Field(None, ge=1, le=65_536)
    """lora-svd only: its rank. Default: 64."""
    max_error: float | None = Field(None, gt=0, lt=1)
    """lora-svd only, instead of rank: the smallest rank (the same in all layers) with |dW - B A| / |dW| at most this."""
    out: PathText | None = None
    """Folder for the adapters' folders. Default: adapters/, flora/, merged/ or lora-svd/ of the run."""

    @field_validator("rank", "max_error")
    @classmethod
    def _of_a_stand_in(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("as_", "lora-svd") != "lora-svd":
            raise ValueError(f"has no meaning for --as {info.data['as_']}: it is for --as lora-svd")
        if value is not None and info.data.get("rank") is not None:
            raise ValueError("and rank both choose the rank: give one")
        return value


def export_adapters(
    run: str | Path,
    names: Sequence[str] = (),
    as_: str = "peft",
    *,
    rank: int | None = None,
    max_error: float | None = None,
    out: str | Path | None = None,
    allow_different_base: bool = False,
    allow_different_data: bool = False,
) -> list[Path]:
    """Write adapters of a run for other programs.

    Args:
        run: The folder of a run.
        names: Names of adapters. Default: all.
        as_: `"peft"`: the formats of PEFT (LORA, IA3, HIRA for fLoRA), exact. `"flora"`: fLoRA under a type of its own, without the extra
            rank of HIRA, for `flora_train.peft_plugin`. `"merged"`: plain models with the adapter folded in, in float32.
            `"lora-svd"`: the closest LoRA, for servers that accept nothing else.
        rank: With `"lora-svd"`, its rank. Default: 64.
        max_error: With `"lora-svd"`, instead of `rank`: the smallest rank, the same in all layers, with |dW - B A| / |dW| of at most this.
        out: Folder for the folders of the adapters. Default: adapters/, flora/, merged/ or lora-svd/ of the run.
        allow_different_base: Accept another base model than the run was trained on. Results say so.
        allow_different_data: Accept other rows than the run was trained on. Results say so.

    Returns:
        The folder of each adapter.

    Raises:
        UserError: For wrong input, before anything is written.
    """
    options = read_options(
        ExportOptions, {"as": as_, "rank": rank, "max_error": max_error, "out": None if out is None else str(out)}
    )
    allow = OriginOptions(allow_different_base=allow_different_base, allow_different_data=allow_different_data)
    return _export(str(run), names, options, allow)


def _export(run: str, names: Sequence[str], options: ExportOptions, allow: OriginOptions) -> list[Path]:
    folder, _ = open_run(run)
    own = folder.path / FOLDERS[options.as_]
    out = own if options.out is None else Path(options.out)
    inside = real_path(out).is_relative_to(real_path(folder.path))
    alone = inside or allow.allow_different_base or allow.allow_different_data
    with locked(run, alone) as folder:
        check_writable(out)
        if options.as_ == "merged":
            return merge(run, names, out, allow)
        stands_in = options.as_ == "lora-svd"
        session, _ = load_run(run, with_tasks=stands_in, dtype="float32" if stands_in else None, allow=allow)
        names = checked(session.bank, names, options.as_)
        files = [f"{FOLDERS[options.as_]}/{{adapter}}/{file}" for file in PEFT_FILES]
        ours = real_path(out) == real_path(own) and (options.as_ == "peft" or folder.names(files))
        for name in () if ours else names:
            check_new(out / name)
        if real_path(out) == real_path(own):
            folder.add_files(files)
        note_differences(folder, f"export --as {options.as_}", session.differences)
        report = read_report_if_any(folder)
        if stands_in:
            found = [_svd_lora(session.bank, name, options) for name in names]
            return _write_stand_ins(session, found, report, out, replace=ours)
        base = BaseModel(session.config.model.path, session.config.model.revision)
        for name in names:
            own_type = options.as_ == "flora"
            export_peft(session.bank, name, out / name, base=base, own_type=own_type, replace=ours)
            spec = session.bank.specs[session.bank.ids[name]]
            example = generation_example(session.config, spec.task)
            write_card(report, spec, out / name, example=example, origin=" ".join(session.differences))
        _say_what_peft_does(out / name for name in names)
        return [out / name for name in names]


def checked(bank: AdapterBank, names: Sequence[str], as_: str) -> list[str]:
    """These, or all. Raises UserError for one that is unknown or that cannot be written so."""
    methods = {spec.name: spec.method for spec in bank.specs}
    for name in names:
        bank.id_of(name)
        if as_ == "flora" and methods[name] != "flora":
            raise user_error("adapter", name, f"is {methods[name]}: --as flora writes fLoRA only; --as peft writes all methods")
    return list(dict.fromkeys(names)) or [name for name, method in methods.items() if as_ != "flora" or method == "flora"]


def merge(run: str, names: Sequence[str], out: Path, allow: OriginOptions) -> list[Path]:
    """Plain models in float32: rounding W0 * M to half precision would lose its small modulations."""
    session, _ = load_run(run, dtype="float32", allow=allow)
    names = checked(session.bank, names, "merged")
    for taken in (out / name for name in names if (out / name).exists()):
        raise user_error("output folder", str(taken), "exists already: choose another with --out, or delete it")
    note_differences(session.folder, "export --as merged", session.differences)
    for i, name in enumerate(names):
        if i:  # the bank's base was consumed
            session, _ = load_run(run, dtype="float32", allow=allow)
        published: Any = load_model_config(session.config.model)  # ours has its dropout switched off
        published.dtype = torch.float32
        session.model.config = published
        made_of = {"adapter": name, "base": session.config.model.path, "run": run, "differences": list(session.differences)}
        preprocessors = load_preprocessors(session.config.model, session.tokenizer)
        save_merged(session.bank, name, out / name, preprocessors=preprocessors, origin=made_of)
        if real_path(out) == real_path(session.folder.path / FOLDERS["merged"]):
            session.folder.add_files(f"merged/{name}/{path.name}" for path in (out / name).iterdir())
    return [out / name for name in names]


def _svd_lora(bank: AdapterBank, name: str, options: ExportOptions) -> SvdLora:
    rank = None if options.max_error is not None else options.rank or RANK
    with ProgressBar(f"decompose {name}", 1.0) as watch:
        return compute_svd_lora(bank, name, rank=rank, max_error=options.max_error, report=watch.update)


def _write_stand_ins(
    session: RunContext, svd_loras: Sequence[SvdLora], report: Report | None, out: Path, replace: bool
) -> list[Path]:
    """PEFT folders, with what was lost in the terminal and on the cards."""
    names = [svd_lora.spec.name for svd_lora in svd_loras]
    others = [i for name, i in session.bank.ids.items() if name not in names]
    before = _heldout(session, session.bank, others)
    bank = AdapterBank.attach(
        load_base_model(session.config.model, session.bank.device), [svd_lora.spec for svd_lora in svd_loras]
    )
    base = BaseModel(session.config.model.path, session.config.model.revision)
    for svd_lora in svd_loras:
        write_into(bank, svd_lora)
        place = out / svd_lora.spec.name
        export_peft(bank, svd_lora.spec.name, place, base=base, always_lora=True, replace=replace)
    after = _heldout(session, bank, ())
    table = Table(box=SIMPLE_HEAD, title="closest LoRAs: held-out loss, nats a token", title_justify="left")
    for heading in ("adapter", "rank", "|dW - BA| / |dW|", "base", "adapter", "LoRA"):
        table.add_column(heading, justify="left" if heading == "adapter" and not table.columns else "right")
    for svd_lora in svd_loras:
        name, task = svd_lora.spec.name, svd_lora.spec.task
        losses = {"base": before[task]["base"], "adapter": before[task][name], "LoRA": after[task][name]}
        table.add_row(
            in_cell(name), str(svd_lora.spec.rank), f"{svd_lora.error:.3f}", *(f"{loss:.3f}" for loss in losses.values())
        )
        original = session.bank.specs[session.bank.ids[name]]
        write_card(
            report,
            original,
            out / name,
            example=generation_example(session.config, original.task),
            svd_lora=svd_lora,
            losses=losses,
            origin=" ".join(session.differences),
        )
    print_table(table)
    for svd_lora in svd_loras:
        if svd_lora.biases:
            print_plain(f"note: {svd_lora.spec.name} changes the biases of {svd_lora.biases} layers, which a LoRA cannot")
    _say_what_peft_does(out / name for name in names)
    return [out / name for name in names]


def _say_what_peft_does(folders: Iterable[Path]) -> None:
    """A line for each folder that plain PEFT does not load."""
    for file in (folder / PEFT_WARNING for folder in folders):
        if file.exists():
            print_plain(f"note: {file.parent.name}: {file.read_text(encoding='utf-8').strip()}; --as merged writes a plain model")


def _heldout(session: RunContext, bank: AdapterBank, absent: Sequence[int]) -> Mapping[str, Mapping[str, float]]:
    """Task -> "base" or adapter -> mean nats of a held-out token."""
    names = {BASE_ID: "base"} | {i: spec.name for i, spec in enumerate(bank.specs)}
    losses = {}
    for task, result in heldout_losses(session, bank, absent=absent).items():
        losses[task] = {names[i]: result.loss(i) for i in result.nats}
    return losses
