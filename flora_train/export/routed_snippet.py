"""The Python lines on a routed adapter's card that load its parts and routers with plain PEFT."""

from __future__ import annotations

from flora_train.export.python_source import python_literal

IMPORTS = (
    "import json",
    "",
    "from peft import PeftModel",
    "from safetensors.torch import load_file",
)
LOADER = """\
with open(f"{folder}/routing.json") as file:
    routing = json.load(file)
parts = [f"expert_{e}" for e in range(routing["experts"])] + ["shared"] * routing["shared"]
model = PeftModel.from_pretrained(base, f"{folder}/{parts[0]}", adapter_name=parts[0]).eval()
for part in parts[1:]:
    model.load_adapter(f"{folder}/{part}", adapter_name=part)
model.base_model.set_adapter(parts[-1])


def route(block, router):
    forward = block.forward
    layers = [layer for layer in block.modules() if hasattr(layer, "set_adapter")]

    def routed(x):
        weights, experts = (x.float() @ router.to(x.device).T).softmax(-1).topk(routing["top_k"])
        weights = weights * (weights.cumsum(-1) - weights < routing["top_p"])
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = 0
        for e in range(routing["experts"]):
            for layer in layers:
                layer.set_adapter(f"expert_{e}")
            y = y + forward(x) * (weights * (experts == e)).sum(-1, keepdim=True)
        return y

    block.forward = routed


for name, router in load_file(f"{folder}/router.safetensors").items():
    route(base.get_submodule(name), router)"""
"""Needs `folder` and `base`. Computes every expert for every token: it is short, not fast."""


def loading_lines(source: str, subfolder: str | None, base: str, reader: str) -> list[str]:
    """The lines that load a routed adapter as `model`. base: arguments of from_pretrained; reader: the class
    of the tokenizer; source, subfolder: a local folder, or a repository on the hub and a folder there."""
    imports = [*IMPORTS, f"from transformers import AutoModelForCausalLM, {reader}"]
    folder = python_literal(source)
    if source.count("/") == 1 and not source.startswith((".", "/")):
        imports.insert(2, "from huggingface_hub import snapshot_download")
        folder = f"snapshot_download({folder})"
        if subfolder is not None:
            folder += f" + {python_literal('/' + subfolder)}"
    return [
        *imports,
        "",
        f"folder = {folder}",
        f"base = AutoModelForCausalLM.from_pretrained({base})",
        *LOADER.split("\n"),
        "",
    ]
