"""What does an exported adapter say of itself? A model card beside it: how to load it, what it is good for, and how that was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.paths import find_file
from flora_train.config.terminal_text import plain
from flora_train.export.model_card_results import figures, tables
from flora_train.export.svd_lora import SvdLora
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.manifest import PEFT_WARNING

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
KINDS = {"flora": "fLoRA (in PEFT's words HiRA)", "lora": "LoRA", "ia3": "IA3"}


def write_card(
    report: Mapping[str, Any],
    spec: AdapterSpec,
    folder: Path,
    svd_lora: SvdLora | None = None,
    losses: Mapping[str, float] | None = None,
    origin: str = "",
    source: str | None = None,
) -> Path:
    """README.md in the folder of an exported adapter.

    report: of its run (report.json), or nothing where there is none yet; svd_lora: the LoRA that the folder holds instead; losses: held-out
    nats a token of "base", "adapter" and "LoRA"; origin: a sentence on what it was made from; source:
    what PeftModel.from_pretrained is called with after the base (default: the folder's name). Returns the folder.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    warning = folder / PEFT_WARNING
    base = config["base_model_name_or_path"]
    adapter = next((row for row in report.get("adapters", ()) if row["name"] == spec.name), None)
    data: Mapping[str, Any] = next((row for row in report.get("tasks", ()) if row["name"] == spec.task), {})
    spoken, own_type = config["task_type"] is None, config["peft_type"] == "FLORA"
    kind = "automatic-speech-recognition" if spoken else "text-generation"
    known = [
        EvalResult(
            kind, figure.data, f"{figure.data} ({figure.subset})", figure.metric, figure.value, dataset_config=figure.subset
        )
        for figure in figures(report, spec.name)
        if svd_lora is None
    ]
    card_data = ModelCardData(
        base_model=None if find_file(base).exists() else base,
        library_name="peft",
        tags=["flora_train", config["peft_type"].lower()],
        license=data.get("license"),
        language=[data["speech"]] if data.get("speech") else None,
        datasets=[data["hub"]] if data.get("hub") else None,
        model_name=spec.name if known else None,
        eval_results=known or None,
    )
    text = _template().render(
        card_data=card_data.to_yaml(),
        name=spec.name,
        kind="fLoRA" if own_type else KINDS[spec.method] if svd_lora is None else "LoRA",
        own_type=own_type,
        original=KINDS[spec.method],
        base=in_code(base),
        base_literal=json.dumps(base),
        task=spec.task,
        others=max(0, len(report.get("adapters", ())) - 1),
        source=source or f'"{folder.name}"',
        auto_class="AutoModelForSpeechSeq2Seq" if spoken else "AutoModelForCausalLM",
        reader="AutoProcessor" if spoken else "AutoTokenizer",
        svd_lora=svd_lora,
        losses=losses,
        origin=origin,
        warning=warning.read_text(encoding="utf-8").strip() if warning.exists() else "",
        as_adalora=config["peft_type"] == "ADALORA",
        adapter=adapter,
        tables=tables(report, spec.name),
        spec=spec,
        data={key: in_line(value) if isinstance(value, str) else value for key, value in data.items()},
        facts=report.get("facts"),
        limits=report.get("not_measured"),
    )
    card = plain(ModelCard(text)).rstrip() + "\n"
    write_atomically(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
    return folder


def in_line(text: str) -> str:
    """What somebody calls something, for a line or a table of Markdown: on one line, and what would end a cell or begin HTML, a link or
    code as entities."""
    shown = plain(" ".join(text.split("\n")), keep="")
    entities = {"&": "&amp;", "<": "&lt;", "|": "&#124;", "`": "&#96;", "[": "&#91;", "*": "&#42;"}
    return "".join(entities.get(character, character) for character in shown)


def in_code(text: str) -> str:
    """The same for a code span, which knows no entities."""
    return plain(" ".join(text.split("\n")), keep="").replace("`", "'")


@cache
def _template() -> Template:
    """Compiled once for the cards of a thousand adapters: that takes longer than to fill it in."""
    return Template(TEMPLATE.read_text(encoding="utf-8"))
