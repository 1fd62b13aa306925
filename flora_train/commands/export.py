"""flora-train export: writes PEFT folders, plain models or the closest LoRAs of a run's adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routed.folder import is_routed_folder
from flora_train.adapters.spec import BASE_ID, expand
from flora_train.config.base import ConfigModel, PathText
from flora_train.config.command_options import read_options
from flora_train.config.errors import user_error
from flora_train.config.terminal_text import in_cell, print_plain, print_table
from flora_train.evaluation.report.files import read_report_if_any
from flora_train.export.export_forms import check_forms, possible_names
from flora_train.export.merge import save_merged
from flora_train.export.mixlora_format import check_layers, check_settings, export_mixlora
from flora_train.export.model_card import write_card
from flora_train.export.peft_format import base_of, check_new, export_peft
from flora_train.export.routed_format import export_adapter
from flora_train.export.sentence_transformers import write_embedding_files
from flora_train.export.svd_lora import SvdLora, compute_svd_lora, write_into
from flora_train.export.usage_snippet import generation_example
from flora_train.final_evaluation import heldout_losses
from flora_train.models.loading import load_base_model, load_model_config, load_preprocessors
from flora_train.run_context import RunContext, load_run, locked, note_differences
from flora_train.runtime.atomic import check_writable, real_path
from flora_train.runtime.manifest import (
    EMBEDDING_FILES,
    MIXLORA_FILES,
    PEFT_FILES,
    PEFT_WARNING,
    ROUTED_FILES,
)
from flora_train.runtime.progress import ProgressBar
from flora_train.runtime.run_folder import open_run
from flora_train.training.origin import OriginOptions

FOLDERS = {
    "peft": "adapters",
    "flora": "flora",
    "merged": "merged",
    "lora-svd": "lora-svd",
    "mixlora": "mixlora",
}
"""Format -> folder in the run."""
DEFAULT_RANK = 64
"""Rank of a lora-svd export. vLLM's own default limit is 16 (`max_lora_rank`), and can be raised."""


class ExportOptions(ConfigModel):
    as_: Literal["peft", "flora", "merged", "lora-svd", "mixlora"] = Field("peft", alias="as")
    """peft: PEFT's own types (LORA, IA3, HIRA for fLoRA), exact; several folders of a routed adapter. flora:
    fLoRA under a type of its own, without HiRA's extra rank, for PEFT with flora_train.peft_plugin. merged: a
    plain model with the adapter folded in, in float32. lora-svd: the closest LoRA, for servers that accept
    nothing else. mixlora: MixLoRA's published layout, for package mixlora."""
    rank: int | None = Field(None, ge=1, le=65_536)
    """lora-svd only: its rank. Default: 64."""
    max_error: float | None = Field(None, gt=0, lt=1)
    """lora-svd only, instead of rank: the smallest rank, the same in all layers, with |dW - B A| / |dW| at
    most this."""
    out: PathText | None = None
    """Folder for the adapters' folders. Default: adapters/, flora/, merged/, lora-svd/ or mixlora/ of the
    run."""

    @field_validator("rank", "max_error")
    @classmethod
    def _for_lora_svd(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("as_", "lora-svd") != "lora-svd":
            raise ValueError(f"has no meaning for --as {info.data['as_']}: it is for --as lora-svd")
        if value is not None and info.data.get("rank") is not None:
            raise ValueError("and rank both set the rank: give one")
        return value


def export_adapters(
    run: str | os.PathLike[str],
    names: Sequence[str] = (),
    as_: str = "peft",
    *,
    rank: int | None = None,
    max_error: float | None = None,
    out: str | os.PathLike[str] | None = None,
    allow_different_base: bool = False,
    allow_different_data: bool = False,
) -> list[Path]:
    """Write adapters of a run for other programs.

    Args:
        run: The folder of a run.
        names: Names of adapters. Default: all.
        as_: `"peft"`: the types of PEFT (LORA, IA3, HIRA for fLoRA), exact. `"flora"`: fLoRA under a type of
            its own, without the extra rank of HIRA, for `flora_train.peft_plugin`. `"merged"`: plain models
            with the adapter folded in, in float32. `"lora-svd"`: the closest LoRA, for servers that accept
            nothing else. `"mixlora"`: MixLoRA's published layout, of adapters of method mixlora.
        rank: With `"lora-svd"`, its rank. Default: 64.
        max_error: With `"lora-svd"`, instead of `rank`: the smallest rank, the same in all layers, with a
            relative error |dW - B A| / |dW| of at most this.
        out: Folder for the folders of the adapters. Default: adapters/, flora/, merged/, lora-svd/ or
            mixlora/ of the run.
        allow_different_base: Accept another base model than the run was trained on. Results say so.
        allow_different_data: Accept other rows than the run was trained on. Results say so.

    Returns:
        The folder of each adapter.

    Raises:
        UserError: For wrong input, before anything is written.
    """
    values = {"as": as_, "rank": rank, "max_error": max_error}
    if out is not None:
        values["out"] = os.fspath(out)
    options = read_options(ExportOptions, values)
    allow = OriginOptions(
        allow_different_base=allow_different_base, allow_different_data=allow_different_data
    )
    return _export(os.fspath(run), names, options, allow)


def _export(run: str, names: Sequence[str], options: ExportOptions, allow: OriginOptions) -> list[Path]:
    folder, config = open_run(run)
    check_forms(expand(config), names, options.as_)
    default = folder.path / FOLDERS[options.as_]
    out = default if options.out is None else Path(options.out)
    in_run = real_path(out).is_relative_to(real_path(folder.path))
    alone = in_run or allow.allow_different_base or allow.allow_different_data
    with locked(run, alone) as folder:
        check_writable(out)
        if options.as_ == "merged":
            return _export_merged(run, names, out, allow)
        is_svd = options.as_ == "lora-svd"
        dtype = "float32" if is_svd else None
        context, _ = load_run(run, with_tasks=is_svd, dtype=dtype, allow=allow)
        names = _chosen_names(context.bank, names, options.as_)
        replace = _claim(
            context, names, out, in_default=real_path(out) == real_path(default), as_=options.as_
        )
        if is_svd:
            _export_svd(context, names, out, options=options, replace=replace)
        elif options.as_ == "mixlora":
            _export_mixlora(context, names, out, replace=replace)
        else:
            _export_exact(context, names, out, own_type=options.as_ == "flora", replace=replace)
        _print_peft_warnings(out, names)
        return [out / name for name in names]


def _claim(context: RunContext, names: Sequence[str], out: Path, *, in_default: bool, as_: str) -> bool:
    """Note the files in the run's manifest, if they are written into its own folder. Returns whether files
    that are there are the run's, and may be replaced. Raises UserError if files of others are in the way."""
    written: tuple[str, ...] = (*PEFT_FILES, *EMBEDDING_FILES, *ROUTED_FILES)
    if as_ == "mixlora":
        written = MIXLORA_FILES
    files = [f"{FOLDERS[as_]}/{{adapter}}/{file}" for file in written]
    is_own = in_default and (as_ == "peft" or context.folder.names(files))
    if not is_own:
        for name in names:
            check_new(out / name)
    if in_default:
        context.folder.add_files(files)
    note_differences(context.folder, f"export --as {as_}", context.differences)
    return is_own


def _chosen_names(bank: AdapterBank, names: Sequence[str], as_: str) -> list[str]:
    """These adapters, or all that can be written so. Raises UserError for one that is unknown."""
    for name in names:
        bank.id_of(name)
    return list(dict.fromkeys(names)) or possible_names(bank.specs, as_)


def _export_exact(
    context: RunContext, names: Sequence[str], out: Path, *, own_type: bool, replace: bool
) -> None:
    """PEFT folders, without loss. own_type: under the type of flora_train.peft_plugin."""
    report, base = read_report_if_any(context.folder), base_of(context)
    for name in names:
        export_adapter(context.bank, name, out / name, base=base, own_type=own_type, replace=replace)
        spec = context.bank.specs[context.bank.ids[name]]
        if not spec.is_routed:
            write_embedding_files(context, name, out / name)
        example = generation_example(context.config, spec.task)
        write_card(report, spec, out / name, example=example, origin=" ".join(context.differences))


def _export_mixlora(context: RunContext, names: Sequence[str], out: Path, *, replace: bool) -> None:
    """Folders in the published layout of MixLoRA. Nothing is written unless all adapters can be."""
    base = base_of(context)
    for name in names:
        check_settings(context.bank.specs[context.bank.ids[name]])
        check_layers(context.bank, name)
    for name in names:
        export_mixlora(context.bank, name, out / name, base=base, replace=replace)


def _export_merged(run: str, names: Sequence[str], out: Path, allow: OriginOptions) -> list[Path]:
    """Plain models in float32: rounding W0 * M to half precision would lose its small modulations."""
    context, _ = load_run(run, dtype="float32", allow=allow)
    names = _chosen_names(context.bank, names, "merged")
    for name in names:
        if (out / name).exists():
            hint = "exists already: choose another with --out, or delete it"
            raise user_error("output folder", str(out / name), hint)
    note_differences(context.folder, "export --as merged", context.differences)
    for i, name in enumerate(names):
        if i:  # merging changes the base of the bank
            context, _ = load_run(run, dtype="float32", allow=allow)
        model_settings = context.config.model
        published: Any = load_model_config(
            model_settings
        )  # that of the loaded model has its dropout switched off
        published.dtype = torch.float32
        context.model.config = published
        origin = {
            "adapter": name,
            "base": model_settings.path,
            "run": run,
            "differences": list(context.differences),
        }
        preprocessors = load_preprocessors(model_settings, context.tokenizer)
        save_merged(context.bank, name, out / name, preprocessors=preprocessors, origin=origin)
        write_embedding_files(context, name, out / name)
        if real_path(out) == real_path(context.folder.path / FOLDERS["merged"]):
            files = [path for path in (out / name).rglob("*") if path.is_file()]
            context.folder.add_files(path.relative_to(out.parent).as_posix() for path in files)
    return [out / name for name in names]


def _export_svd(
    context: RunContext, names: Sequence[str], out: Path, *, options: ExportOptions, replace: bool
) -> None:
    """The closest LoRAs, with their errors and losses in the terminal and on the cards."""
    loras = [_svd_lora(context.bank, name, options) for name in names]
    others = [i for name, i in context.bank.ids.items() if name not in names]
    before = _heldout(context, context.bank, others)
    model = load_base_model(context.config.model, context.bank.device)
    bank = AdapterBank.attach(model, [lora.spec for lora in loras])
    for lora in loras:
        write_into(bank, lora)
        folder = out / lora.spec.name
        export_peft(bank, lora.spec.name, folder, base=base_of(context), always_lora=True, replace=replace)
        write_embedding_files(context, lora.spec.name, folder)
    after = _heldout(context, bank, ())
    losses = {}
    for lora in loras:
        name, task = lora.spec.name, lora.spec.task
        losses[name] = {
            "base": before[task]["base"],
            "adapter": before[task][name],
            "LoRA": after[task][name],
        }
    _write_svd_cards(context, loras, losses, out)
    print_table(_svd_table(loras, losses))
    for lora in loras:
        if lora.biases:
            print_plain(
                f"note: {lora.spec.name} changes the biases of {lora.biases} layers, which a LoRA cannot"
            )


def _svd_lora(bank: AdapterBank, name: str, options: ExportOptions) -> SvdLora:
    rank = options.rank
    if rank is None and options.max_error is None:
        rank = DEFAULT_RANK
    with ProgressBar(f"decompose {name}", 1.0) as bar:
        return compute_svd_lora(bank, name, rank=rank, max_error=options.max_error, report=bar.update)


def _svd_table(loras: Sequence[SvdLora], losses: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="closest LoRAs: held-out loss, nats a token", title_justify="left")
    table.add_column("adapter")
    for heading in ("rank", "|dW - BA| / |dW|", "base", "adapter", "LoRA"):
        table.add_column(heading, justify="right")
    for lora in loras:
        name = lora.spec.name
        columns = [f"{loss:.3f}" for loss in losses[name].values()]
        table.add_row(in_cell(name), str(lora.spec.rank), f"{lora.error:.3f}", *columns)
    return table


def _write_svd_cards(
    context: RunContext, loras: Sequence[SvdLora], losses: Mapping[str, Mapping[str, float]], out: Path
) -> None:
    report = read_report_if_any(context.folder)
    for lora in loras:
        original = context.bank.specs[context.bank.ids[lora.spec.name]]
        write_card(
            report,
            original,
            out / original.name,
            example=generation_example(context.config, original.task),
            svd_lora=lora,
            losses=losses[original.name],
            origin=" ".join(context.differences),
        )


def _print_peft_warnings(out: Path, names: Sequence[str]) -> None:
    """A line for each folder that plain PEFT does not load."""
    for name in names:
        file = out / name / PEFT_WARNING
        if file.exists():
            warning = file.read_text(encoding="utf-8").strip()
            advice = "" if is_routed_folder(out / name) else "; --as merged writes a plain model"
            print_plain(f"note: {name}: {warning}{advice}")


def _heldout(
    context: RunContext, bank: AdapterBank, absent: Sequence[int]
) -> Mapping[str, Mapping[str, float]]:
    """Task -> "base" or adapter -> mean nats of a held-out token."""
    names = {BASE_ID: "base"} | {i: spec.name for i, spec in enumerate(bank.specs)}
    losses = {}
    for task, result in heldout_losses(context, bank, absent=absent).items():
        losses[task] = {names[i]: result.loss(i) for i in result.nats}
    return losses
