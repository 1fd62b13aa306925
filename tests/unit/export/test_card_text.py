"""A model card stays valid Markdown and YAML for any name of a base, licence or data set."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from flora_train.evaluation.report.types import Report
from flora_train.export.model_card import in_code, in_line, write_card
from flora_train.export.usage_snippet import GenerationExample
from tests.conftest import spec

EVIL = "a`b | c\n---\n# Heading <script>alert(1)</script> [x](javascript:1) \x1b[31m \u202e \"'"
REPORT = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "quickstart.json"


@pytest.mark.parametrize("evil", [EVIL, '"); import os; os.system("x', "\\", "---", "{{ 7 * 7 }}"])
def test_card_is_valid_for_any_names(evil: str, tmp_path: Path) -> None:
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    for task in report["tasks"]:
        task |= {"license": evil, "hub": evil, "origin": evil}
    settings = {
        "base_model_name_or_path": evil,
        "revision": evil,
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
    }
    folder = tmp_path / "ruby-ia3"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_card(
        Report.model_validate(report),
        spec("ia3", "ruby"),
        folder,
        example=GenerationExample(prompt=f"```\n{evil}"),
    )
    card = (folder / "README.md").read_text(encoding="utf-8")
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.S).groups()  # type: ignore[union-attr]
    assert yaml.safe_load(head)["base_model"] == evil
    assert yaml.safe_load(head)["license"] == evil
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", card)
    assert "<script>" not in re.sub(r"```python\n.*?```|`[^`\n]*`", "", body, flags=re.S)
    assert "49" not in re.findall(r"task `ruby`", body)
    code = re.search(r"```python\n(.*?)```", body, re.S)
    assert code is not None
    program = ast.parse(code[1])
    calls = [node for node in ast.walk(program) if isinstance(node, ast.Call)]
    methods = [call.func.attr for call in calls if isinstance(call.func, ast.Attribute)]
    assert sorted(methods) == ["decode", "eval", *["from_pretrained"] * 3, "generate", "to"]
    texts = [node.value for node in ast.walk(program) if isinstance(node, ast.Constant)]
    assert texts.count(evil) == 4  # base and revision, of the model and of the tokenizer
    assert f"```\n{evil}" in texts
    rows = [line for line in body.splitlines() if line.startswith("| data |")]
    assert [row.count("|") for row in rows] == [3]
    assert [line for line in body.splitlines() if line.startswith("# ")] == ["# ruby-ia3"]


def test_text_in_a_line_keeps_ordinary_names() -> None:
    assert (
        in_line("HuggingFaceTB/SmolLM2-135M, cc-by-4.0 (naïve)")
        == "HuggingFaceTB/SmolLM2-135M, cc-by-4.0 (naïve)"
    )
    assert in_code("assets/models/smollm2-135m") == "assets/models/smollm2-135m"
