"""What does an exported adapter say of itself? A model card beside it: how to load it, what it is good for, and how that was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora_train.adapters.spec import AdapterSpec
from flora_train.atomic import write_atomically
from flora_train.config.files import find_file
from flora_train.export.stand_in import StandIn

TEMPLATE = Path(__file__).with_name("card.md.jinja")
KINDS = {"flora": "fLoRA (in PEFT's words HiRA)", "lora": "LoRA", "ia3": "IA3"}


def write_card(
    report: Mapping[str, Any],
    spec: AdapterSpec,
    folder: Path,
    stand_in: StandIn | None = None,
    losses: Mapping[str, float] | None = None,
    origin: str = "",
    source: str | None = None,
) -> Path:
    """README.md in the folder of an exported adapter.

    report: of its run (report.json), or nothing where there is none yet; stand_in: the LoRA that the folder holds instead; losses: held-out
    nats a token of "base", "adapter" and "LoRA"; origin: a sentence on what it was made from; source:
    what PeftModel.from_pretrained is called with after the base (default: the folder's name). Returns the folder.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    adapter = next((row for row in report.get("adapters", ()) if row["name"] == spec.name), None)
    result = next((row for row in report.get("results", ()) if row["task"] == spec.task), None)
    data = next((row for row in report.get("tasks", ()) if row["name"] == spec.task), None)
    spoken = config["task_type"] is None
    known: list[Any] = []
    if result is not None and stand_in is None:
        mine = next(row for row in result["contenders"] if row["name"] == spec.name)
        known.append(
            EvalResult(
                task_type="automatic-speech-recognition" if spoken else "text-generation",
                dataset_type=spec.task,
                dataset_name=f"{spec.task} (held out)",
                metric_type="bits_per_byte",
                metric_value=mine["bits_per_byte"]["value"],
            )
        )
    card_data = ModelCardData(
        base_model=None if find_file(base).exists() else base,
        library_name="peft",
        tags=["flora_train", config["peft_type"].lower()],
        model_name=spec.name if known else None,
        eval_results=known or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=spec.name,
        kind=KINDS[spec.method] if stand_in is None else "LoRA",
        original=KINDS[spec.method],
        base=base,
        task=spec.task,
        others=max(0, len(report.get("adapters", ())) - 1),
        source=source or f'"{folder.name}"',
        auto_class="AutoModelForSpeechSeq2Seq" if spoken else "AutoModelForCausalLM",
        reader="AutoProcessor" if spoken else "AutoTokenizer",
        stand_in=stand_in,
        losses=losses,
        origin=origin,
        adapter=adapter,
        result=result,
        data=data,
        facts=report.get("facts"),
        limits=report.get("not_measured"),
    )
    write_atomically(folder / "README.md", lambda path: path.write_text(str(card).rstrip() + "\n", encoding="utf-8"))
    return folder
