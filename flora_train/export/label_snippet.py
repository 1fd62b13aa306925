"""The Python snippet of a model card of an adapter with a head: it predicts the label of one text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flora_train.export.label_names import LabelNames
from flora_train.export.python_source import python_literal

MOST_NAMES = 50
"""Labels that are written into a snippet; others are in the file of labels."""
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def label_snippet(
    adapter_config: Mapping[str, Any], labels: LabelNames, *, source: str, subfolder: str | None = None
) -> str:
    """Python source that runs as it stands, once the adapter is at `source`. See `usage_snippet`."""
    base = python_literal(adapter_config["base_model_name_or_path"])
    revision = ""
    if adapter_config.get("revision") is not None:
        revision = f", revision={python_literal(adapter_config['revision'])}"
    adapter = python_literal(source)
    if subfolder is not None:
        adapter += f", subfolder={python_literal(subfolder)}"
    auto_class = AUTO_CLASSES[adapter_config["task_type"]]
    lines = ["from peft import PeftModel", f"from transformers import {auto_class}, AutoTokenizer"]
    if adapter_config["peft_type"] == "FLORA":
        lines.insert(0, "import flora_train.peft_plugin")
    outputs = len(labels.names) or 1
    are_named = 0 < len(labels.names) <= MOST_NAMES
    options = f"num_labels={outputs}"
    if are_named:
        names = ", ".join(map(python_literal, labels.names))
        lines += ["", f"labels = [{names}]"]
        options = "num_labels=len(labels), id2label=dict(enumerate(labels))"
    lines += [
        "",
        f"base = {auto_class}.from_pretrained({base}{revision}, {options})",
        f"model = PeftModel.from_pretrained(base, {adapter}).eval()",
        f"tokenizer = AutoTokenizer.from_pretrained({base}{revision})",
        "",
        'inputs = tokenizer("A text", return_tensors="pt").to(model.device)',
        "outputs = model(**inputs).logits[0].detach()",
        *_shown(labels.problem_type, are_named),
    ]
    return "\n".join(lines)


def _shown(problem_type: str, are_named: bool) -> list[str]:
    """The lines that print what is predicted."""
    if problem_type == "regression":
        return ["print(outputs.item())"]
    if problem_type == "multi_label_classification":
        chosen = "[label for label, logit in zip(labels, outputs) if logit > 0]"
        return [f"print({chosen})" if are_named else "print((outputs > 0).nonzero().flatten().tolist())"]
    if problem_type == "token_classification":
        tokens = 'tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])'
        number = "labels[row.argmax()]" if are_named else "row.argmax().item()"
        return [f"for token, row in zip({tokens}, outputs):", f"    print(token, {number})"]
    return ["print(labels[outputs.argmax()])" if are_named else "print(outputs.argmax().item())"]
