"""The Python lines on a routed adapter's card that load its parts and routers with plain PEFT."""

from __future__ import annotations

from flora_train.export.python_source import python_literal

IMPORTS = (
    "import json",
    "",
    "from peft import PeftModel",
    "from safetensors.torch import load_file",
)
PARTS = """\
with open(f"{folder}/routing.json") as file:
    routing = json.load(file)
parts = [f"expert_{e}" for e in range(routing["experts"])] + ["shared"] * routing["shared"]
model = PeftModel.from_pretrained(base, f"{folder}/{parts[0]}", adapter_name=parts[0]).eval()
for part in parts[1:]:
    model.load_adapter(f"{folder}/{part}", adapter_name=part)
model.base_model.set_adapter(parts[-1])"""
"""Loads the parts as adapters of one model. Needs `folder` and `base`."""
LOADER = f"""\
{PARTS}


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
                layer.set_adapter(f"expert_{{e}}")
            y = y + forward(x) * (weights * (experts == e)).sum(-1, keepdim=True)
        return y

    block.forward = routed


for name, router in load_file(f"{{folder}}/router.safetensors").items():
    route(base.get_submodule(name), router)"""
"""Of mixlora. Computes every expert for every token: it is short, not fast."""
GATE_LOADER = """\
with open(f"{folder}/routing.json") as file:
    routing = json.load(file)
members = []
for e in range(routing["experts"]):
    shared = {id(weight): weight for weight in base.parameters()}
    own = deepcopy(base, shared)  # modules of its own, the same weights
    members.append(PeftModel.from_pretrained(own, f"{folder}/expert_{e}").eval())


def route(name, router):
    layers = [member.base_model.model.get_submodule(name) for member in members]

    def routed(x):
        weights, experts = (x.float() @ router.to(x.device).T).softmax(-1).topk(routing["top_k"])
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = 0
        for e, layer in enumerate(layers):
            y = y + layer(x) * (weights * (experts == e)).sum(-1, keepdim=True)
        return y

    base.get_submodule(name).forward = routed


for name, router in load_file(f"{folder}/router.safetensors").items():
    route(name, router)
model = base.eval()"""
"""Of meteora. Members of several methods, which one PeftModel cannot hold, each have one of their own."""
SWITCH_LOADER = f"""\
{PARTS}
((name, router),) = load_file(f"{{folder}}/router.safetensors").items()
first, chosen = base.get_submodule(name), {{}}


def route(layer):
    forward = layer.forward

    def routed(x):
        if layer is first:
            weights, experts = (x.float() @ router.to(x.device).T).softmax(-1).topk(routing["top_k"])
            chosen["weights"], chosen["experts"] = weights / weights.sum(-1, keepdim=True), experts
        y = 0
        for e in range(routing["experts"]):
            layer.set_adapter(f"expert_{{e}}")
            weight = (chosen["weights"] * (chosen["experts"] == e)).sum(-1, keepdim=True)
            y = y + forward(x) * weight.to(x.dtype)
        return y

    layer.forward = routed


for module in list(base.modules()):
    if hasattr(module, "set_adapter") and hasattr(module, "base_layer"):
        route(module)"""
"""Of switch: the router reads the input of the first adapted layer, and its choice holds in all of them."""
LOADERS = {"mixlora": LOADER, "meteora": GATE_LOADER, "switch": SWITCH_LOADER}
"""Method -> the lines that load it. Needs `folder` and `base`."""


def loading_lines(
    source: str, subfolder: str | None, base: str, reader: str, *, method: str = "mixlora"
) -> list[str]:
    """The lines that load a routed adapter as `model`. base: arguments of from_pretrained; reader: the class
    of the tokenizer; source, subfolder: a local folder, or a repository on the hub and a folder there."""
    imports = [*IMPORTS, f"from transformers import AutoModelForCausalLM, {reader}"]
    if method == "meteora":
        imports.insert(1, "from copy import deepcopy")
    folder = python_literal(source)
    if source.count("/") == 1 and not source.startswith((".", "/")):
        imports.insert(imports.index("") + 1, "from huggingface_hub import snapshot_download")
        folder = f"snapshot_download({folder})"
        if subfolder is not None:
            folder += f" + {python_literal('/' + subfolder)}"
    return [
        *imports,
        "",
        f"folder = {folder}",
        f"base = AutoModelForCausalLM.from_pretrained({base})",
        *LOADERS[method].split("\n"),
        "",
    ]
