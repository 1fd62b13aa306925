"""The model card of an exported adapter: how to load it, its results and how they were measured."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.paths import find_file
from flora_train.config.terminal_text import plain
from flora_train.evaluation.report.types import AdapterFacts, Report, TaskSummary
from flora_train.export.adapter_description import description_of
from flora_train.export.label_names import read_labels
from flora_train.export.model_card_results import CardMetric, card_results, tables
from flora_train.export.peft_forms import EMBEDDINGS
from flora_train.export.svd_lora import SvdLora
from flora_train.export.usage_snippet import GenerationExample, usage_snippet
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.manifest import PEFT_WARNING

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
HUB_TASKS = {
    None: "automatic-speech-recognition",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    EMBEDDINGS: "sentence-similarity",
}
"""PEFT's task type -> the hub's name of the task, where it is not the generation of text."""
METHOD_TITLES = {
    "flora": "fLoRA (HiRA in PEFT)",
    "lora": "LoRA",
    "dora": "DoRA",
    "ia3": "IA3",
    "head": "head",
    "mixlora": "MixLoRA",
    "meteora": "MeteoRA",
    "switch": "LoRA-Switch",
}


def write_card(
    report: Report | None,
    spec: AdapterSpec,
    folder: Path,
    *,
    example: GenerationExample | None = None,
    svd_lora: SvdLora | None = None,
    losses: Mapping[str, float] | None = None,
    origin: str = "",
    source: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """Write README.md into the folder of an exported adapter; returns the folder.

    report: the report of its run, None if there is none yet; example: input of the snippet's generate() call;
    svd_lora: the LoRA that the folder holds in place of the adapter; losses: held-out nats per token of
    "base", "adapter" and "LoRA"; origin: a sentence on its origin; source, subfolder: where the snippet loads
    the adapter from (default: the folder's name).
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    config = description_of(folder)
    warning, warning_text = folder / PEFT_WARNING, ""
    if warning.exists():
        warning_text = warning.read_text(encoding="utf-8").strip()
    has_loader = not spec.is_routed or config["task_type"] == "CAUSAL_LM"
    snippet = ""
    if has_loader:
        snippet = usage_snippet(
            config,
            example or GenerationExample(),
            source=source or folder.name,
            subfolder=subfolder,
            labels=read_labels(folder),
        )
    base = config["base_model_name_or_path"]
    adapters: dict[str, AdapterFacts] = {}
    tasks: dict[str, TaskSummary] = {}
    if report is not None:
        adapters = {row.name: row for row in report.adapters}
        tasks = {row.name: row for row in report.tasks}
    task = tasks.get(spec.task)
    is_speech, own_type = config["task_type"] is None, config["peft_type"] == "FLORA"
    hub_task = HUB_TASKS.get(config["task_type"], "text-generation")
    embeds = config["task_type"] == EMBEDDINGS
    title = METHOD_TITLES[spec.method] if svd_lora is None else "LoRA"
    if own_type:
        title = "fLoRA"
    metrics: list[CardMetric] = []
    if svd_lora is None:
        metrics = card_results(report, spec.name)
    eval_results = [
        EvalResult(
            hub_task,
            metric.dataset,
            f"{metric.dataset} ({metric.subset})",
            metric.metric,
            metric.value,
            dataset_config=metric.subset,
        )
        for metric in metrics
    ]
    card_data = ModelCardData(
        base_model=None if find_file(base).exists() else base,
        library_name="sentence-transformers" if embeds else "peft",
        tags=["flora_train", config["peft_type"].lower()],
        model_name=spec.name if eval_results else None,
        eval_results=eval_results or None,
        **_data_keys(task),
    )
    text = _template().render(
        card_data=card_data.to_yaml(),
        name=spec.name,
        title=title,
        original=METHOD_TITLES[spec.method],
        base=in_code(base),
        revision=in_code(config.get("revision") or ""),
        snippet=snippet,
        needs_clip=is_speech,
        task=spec.task,
        others=max(0, len(adapters) - 1),
        svd_lora=svd_lora,
        losses=losses,
        origin=origin,
        warning=warning_text,
        as_adalora=config["peft_type"] == "ADALORA",
        adapter=adapters.get(spec.name),
        tables=tables(report, spec.name),
        spec=spec,
        data=task,
        report=report,
    )
    card = plain(ModelCard(text)).rstrip() + "\n"
    write_atomically(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
    return folder


def _data_keys(task: TaskSummary | None) -> dict[str, Any]:
    """The keys of a card's metadata that describe the training data."""
    if task is None:
        return {}
    keys: dict[str, Any] = {"license": task.license}
    if task.spoken_language:
        keys["language"] = [task.spoken_language]
    if task.hub:
        keys["datasets"] = [task.hub]
    return keys


def in_line(text: str) -> str:
    """A name for a line or a table cell of Markdown: on one line, with entities for special characters."""
    shown = plain(" ".join(text.split("\n")), keep="")
    entities = {"&": "&amp;", "<": "&lt;", "|": "&#124;", "`": "&#96;", "[": "&#91;", "*": "&#42;"}
    return "".join(entities.get(character, character) for character in shown)


def in_code(text: str) -> str:
    """A name for a code span of Markdown, in which entities have no meaning."""
    return plain(" ".join(text.split("\n")), keep="").replace("`", "'")


@cache
def _template() -> Template:
    """Compiled once: for a thousand cards, compiling takes longer than rendering."""
    environment = Environment()
    environment.filters["in_line"] = in_line
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
