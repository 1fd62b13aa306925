"""Every architecture attaches with default targets, trains mixed and isolated, and exports to plain PEFT.

docs/architectures.md is this file's table: `pytest tests/unit/test_architectures.py --update-docs` writes it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.fused_experts import fused_experts
from flora_train.adapters.heads import head_of
from flora_train.adapters.spec import AdapterSpec, HeadShape
from flora_train.adapters.targets import endings
from flora_train.config.paths import PROJECT_ROOT
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from tests.architectures import ARCHITECTURES, ENCODERS, MIXTURES, auto_class, model_inputs, tiny_model
from tests.conftest import perturb, spec
from tests.encoders import EMBEDDING_BASES
from tests.families import FAMILIES, FUSED_EXPERTS, OTHER_EXPERTS, Family
from tests.unit.adapters.helpers import tokens
from tests.unit.training.harness import (
    largest_difference_to_training_alone,
    make_trainer,
    moved,
    plans_of,
    train_together,
)

DOCUMENT = PROJECT_ROOT / "docs" / "architectures.md"
ISOLATED = 1e-5
SAME_LOGITS = 1e-5


def default_specs(**options: Any) -> list[AdapterSpec]:
    """Every method on its default targets, fLoRA in both variants."""
    return [
        spec("flora", "a", rank=3, variant="residual", **options),
        spec("flora", "b", "pure", rank=2, variant="pure", **options),
        spec("lora", "c", rank=2, **options),
        spec("ia3", "a", **options),
    ]


@torch.no_grad()
def logits(bank: AdapterBank, inputs: Any, name: str) -> Tensor:
    with bank.routed([name] * len(next(iter(inputs.values())))):
        return bank.model(**inputs).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.quick("llama", "gpt2", "phi", "t5", "whisper")
def test_adapters_of_all_methods_train_mixed_and_each_as_if_alone(architecture: str, tmp_path: Path) -> None:
    specs = default_specs(lr=2e-3)
    together = make_trainer(specs, tmp_path, architecture)
    plans = plans_of(together, 12)
    assert any(len(plan.label_tokens) == len(specs) for plan in plans)
    assert any(len(plan.label_tokens) < len(specs) for plan in plans)
    before = {
        name: float(result.loss(a))
        for result in together.heldout(None, print).values()
        for a, name in named(together.bank, result.nats)
    }
    train_together(together, plans)
    assert min(moved(together, architecture).values()) > 1e-3
    assert all(torch.isfinite(pool.values).all() for pool in together.bank.pools)
    assert before.keys() == together.bank.ids.keys()
    differences = largest_difference_to_training_alone(together, plans, tmp_path, architecture=architecture)
    assert max(differences.values()) <= ISOLATED, differences


def named(bank: AdapterBank, ids: Sequence[int] | Any) -> list[tuple[int, str]]:
    return [(adapter, bank.specs[adapter].name) for adapter in ids]


@pytest.fixture(scope="module")
def exports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """architecture -> adapter -> (our logits, plain PEFT's logits from the exported folder), for all that are
    tested."""
    root, x, ours = tmp_path_factory.mktemp("exports"), tokens(3), {}
    tested = {item.name for item in request.session.items if item.path == request.path}
    for architecture in ARCHITECTURES:
        if f"test_exported_adapters_give_the_same_logits_in_plain_peft[{architecture}]" not in tested:
            continue
        bank = AdapterBank.attach(tiny_model(architecture).eval(), default_specs())
        perturb(bank)
        inputs, folder = dict(model_inputs(architecture, x)), root / architecture
        cast(Any, tiny_model(architecture)).save_pretrained(folder / "base")
        save_file({name: tensor.clone() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
        (folder / "class").write_text(auto_class(cast(Any, bank.model).config).__name__)
        for name in bank.ids:
            export_peft(bank, name, folder / "adapters" / name, base=BaseModel(str(folder / "base")))
        ours[architecture] = {name: logits(bank, inputs, name) for name in bank.ids}
    program = [
        sys.executable,
        str(Path(__file__).parent / "export" / "load_with_peft.py"),
        *(str(root / a) for a in ours),
    ]
    done = subprocess.run(program, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = {architecture: load_file(root / architecture / "logits.safetensors") for architecture in ours}
    return {a: {name: (ours[a][name], theirs[a][name]) for name in ours[a]} for a in ours}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.quick("llama", "gpt2", "phi", "t5", "whisper")
def test_exported_adapters_give_the_same_logits_in_plain_peft(architecture: str, exports: Any) -> None:
    assert len(exports[architecture]) == 4
    with torch.no_grad():
        plain = tiny_model(architecture).eval()(**model_inputs(architecture, tokens(3))).logits
    for name, (ours, theirs) in exports[architecture].items():
        assert (ours - theirs).abs().max() <= SAME_LOGITS, name
        assert (ours - plain).abs().max() > 1e-3, name


@dataclass(frozen=True)
class Coverage:
    """One row of the table."""

    name: str
    model_class: str
    targets: tuple[str, ...]
    scaled_outputs: tuple[str, ...]
    scaled_inputs: tuple[str, ...]


def coverage(architecture: str) -> Coverage:
    bank = AdapterBank.attach(tiny_model(architecture), default_specs())
    pools = {pool.specs[0].method: pool for pool in bank.pools}
    ia3 = pools["ia3"].targets.values()
    return Coverage(
        name=ARCHITECTURES[architecture][0],
        model_class=type(bank.model).__name__,
        targets=tuple(endings(pools["lora"].targets)),
        scaled_outputs=tuple(endings(t.name for t in ia3 if not t.feedforward)),
        scaled_inputs=tuple(endings(t.name for t in ia3 if t.feedforward)),
    )


def encoder_lines() -> list[str]:
    """The section on bases of label tasks."""
    lines = [
        "## Encoders",
        "",
        "Bases of tasks with labels ([heads.md](heads.md)), tested in the same way by",
        "`tests/unit/test_encoders.py`: heads of texts, numbers and tokens, with fLoRA, LoRA, IA3",
        f"and alone, train mixed in the same batches as if alone (<= {ISOLATED:g}), and exported heads",
        f"give the same logits in plain PEFT (<= {SAME_LOGITS:g}). A head consists of what a checkpoint",
        "of pretraining lacks of transformers' class for classification; the pooler of BERT and ALBERT",
        "stays frozen where the checkpoint has it.",
        "",
        (
            "| architecture | fLoRA and LoRA (`default`) | IA3 scales the output of | "
            "IA3 scales the input of | head | embeddings |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for architecture, (name, _) in ENCODERS.items():
        model: Any = tiny_model(architecture)
        bank = AdapterBank.attach(model, default_specs())
        pools = {pool.specs[0].method: pool for pool in bank.pools}
        ia3 = pools["ia3"].targets.values()
        outputs = endings(t.name for t in ia3 if not t.feedforward)
        inputs = endings(t.name for t in ia3 if t.feedforward)
        head = head_of(model, HeadShape("text", 3)).modules
        if architecture == "modernbert":  # its `head` is part of a checkpoint of pretraining
            head = ("classifier",)
        cells = (endings(pools["lora"].targets), outputs, inputs, head)
        listed = [", ".join(f"`{word}`" for word in words) for words in cells]
        embeddings = "equal" if architecture in EMBEDDING_BASES else "not tested"
        lines.append(f"| {name} | {' | '.join(listed)} | {embeddings} |")
    lines += [
        "",
        "Embeddings ([embeddings.md](embeddings.md)): adapters of pairs and triplets (LoRA, fLoRA in",
        "both variants, IA3; mean and first token) that are trained on these encoders load in",
        f"sentence-transformers with equal embeddings (<= {SAME_LOGITS:g},",
        "`tests/e2e/test_sentence_transformers.py`), as those on a Llama do.",
        "",
        "DeBERTa's queries and keys also read the positions, which are no rows of a batch: no adapter is",
        "attached to them. Decoders have heads, too: a linear layer on the last token, or on every token.",
        "",
    ]
    return lines


def mixture_lines() -> list[str]:
    """The section on fused experts."""
    lines = [
        "## Mixtures of experts",
        "",
        "`target_parameters` ([methods.md](methods.md#experts)) attaches fLoRA, LoRA and IA3 to fused",
        "weights of experts. Tested in the same way, by `tests/unit/adapters/test_expert_parameters.py`,",
        "`tests/unit/training/test_expert_isolation.py` and `tests/unit/export/test_expert_forms.py`: values",
        "and every gradient equal a loop over tokens in float64, adapters train mixed as if alone",
        f"(<= {ISOLATED:g} after 20 steps), and a LoRA gives the same logits in plain PEFT",
        f"(<= {SAME_LOGITS:g}).",
        "",
        "| architecture | weights of experts | layout |",
        "|---|---|---|",
    ]
    for architecture, (name, _) in MIXTURES.items():
        model = tiny_model(architecture)
        module, layout = next(iter(fused_experts(model).items()))
        targets = layout.targets(module, model.get_submodule(module))
        names = [".".join(target.split(".")[-3:]) for target in targets]
        order = "[E, in, out]" if layout.is_transposed else "[E, out, in]"
        biases = ", with biases" if layout.has_bias else ""
        lines.append(f"| {name} | {', '.join(f'`{word}`' for word in names)} | {order}{biases} |")
    others = ", ".join(f"`{family}`" for family in FUSED_EXPERTS)
    refused = ", ".join(f"`{family}`" for family in OTHER_EXPERTS)
    lines += [
        "",
        f"Also tested, as mixed batches that equal each row alone: {others}.",
        f"Refused, because their experts have another layout: {refused}. Any other model's",
        "fused experts take adapters if they have transformers' layout (`use_experts_implementation`), and a",
        "probe shows that they compute what it says.",
        "",
        "### Experts that are lists of linear layers",
        "",
        "No adapter is attached to a linear layer that gets the tokens of one expert, selected by index: it",
        "does not see which rows they are of. Three families of the installed transformers have experts that",
        "are modules (a test looks through its code for others):",
        "",
        "| family | why its experts take no adapters |",
        "|---|---|",
        "| `switch_transformers` | an encoder-decoder of texts, which no run trains: text runs make causal "
        "batches. Its other layers take adapters |",
        "| `nllb_moe` | likewise; besides, all rows of a batch share the capacity of an expert, so that rows "
        "displace each other's tokens, and no row could equal itself alone |",
        "| `vitpose_backbone` | reads images, which no run does |",
        "",
        "The other mixtures of transformers hold the weights of all experts in parameters. Code from the hub",
        "(`model.trust_remote_code`) may have such lists where transformers' own class of the same model has",
        "fused experts: leave that option out.",
        "",
    ]
    return lines


def document(rows: Sequence[Coverage]) -> str:
    def code(words: Sequence[str]) -> str:
        return ", ".join(f"`{word}`" for word in words)

    lines = [
        "# Architectures",
        "",
        (
            "Each architecture is tested as a tiny random-weight model in float32 "
            "(`tests/unit/test_architectures.py`, which also"
        ),
        (
            "writes this page): adapters attach to the default targets below, fLoRA (both variants), LoRA "
            "and IA3 train mixed in the"
        ),
        (
            "same batches, every adapter equals the same adapter trained alone (max \\|dW\\| <= "
            f"{ISOLATED:g} after 12 steps), and each"
        ),
        f"exported adapter gives the same logits in plain PEFT (max difference <= {SAME_LOGITS:g}).",
        "",
        (
            "| architecture | transformers class | fLoRA and LoRA (`default`) | IA3 scales the output of | "
            "IA3 scales the input of |"
        ),
        "|---|---|---|---|---|",
    ]
    lines += [
        (
            f"| {row.name} | `{row.model_class}` | {code(row.targets)} | {code(row.scaled_outputs)} | "
            f"{code(row.scaled_inputs)} |"
        )
        for row in rows
    ]
    lines += [
        "",
        (
            "IA3's defaults are PEFT's, where PEFT has them. T5 is covered as a model only: the data "
            "pipeline of a run makes causal"
        ),
        "batches, and speech batches for Whisper and similar models.",
        "",
        *encoder_lines(),
        *mixture_lines(),
        "## Other families",
        "",
        (
            "Any other causal model is probed before training, on a few tokens. The probe determines which "
            "of its linear layers process"
        ),
        (
            "rows independently (the others get no adapter, and a line reports them), whether a row's loss "
            "and gradient depend on its own"
        ),
        (
            "past alone (otherwise the model is refused by name, with the module where rows meet), and "
            "whether rows can be decoded"
        ),
        (
            "together with keys and values as their only state (otherwise one row at a time, by the model's "
            "own `generate`, or by reading"
        ),
        (
            "all tokens again). IA3 needs `target_modules` and `feedforward_modules` there. "
            "Results on tiny random models"
        ),
        "(`tests/unit/test_families.py`):",
        "",
        "| `model_type` | adapters | decoding |",
        "|---|---|---|",
    ]
    lines += [f"| `{name}` | {_adapters(family)} | {_texts(family)} |" for name, family in FAMILIES.items()]
    lines += []
    return "\n".join(lines) + "\n"


def _adapters(family: Family) -> str:
    if family.refused:
        return f"refused: {family.refused.split(': ')[0].strip('()').split('|')[0]}"
    return f"all but `{family.left_out}`" if family.left_out else "all linear layers"


def _texts(family: Family) -> str:
    return (
        ""
        if family.refused
        else {
            "batched": "together",
            "single_row": "one at a time",
            "uncached": "one at a time, reading all tokens again",
        }[family.batching]
    )


def test_table_in_the_docs_is_what_the_models_say(update_docs: Callable[[Path, str], None]) -> None:
    update_docs(DOCUMENT, document([coverage(architecture) for architecture in ARCHITECTURES]))
