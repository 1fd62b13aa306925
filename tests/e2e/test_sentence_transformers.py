"""Exported adapters give the same embeddings in sentence-transformers, whose loss is the same, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer, losses
from transformers import AutoModel

import flora_train
from flora_train.cli import main
from flora_train.config.load import load_config
from flora_train.data.batch import Row
from flora_train.data.embeddings.split import EmbeddingSplit
from flora_train.run_context import load_run
from flora_train.training.embedding_heldout import Embedder
from flora_train.training.embedding_loss import DrawEmbeddings, DrawTexts, contrastive_losses
from flora_train.training.loss import RowLosses
from tests.documents import ROOT, blocks
from tests.e2e.test_embeddings import finished, recipes
from tests.embedding_runs import ADAPTERS, PAIRS, TRIPLETS, triplet, write_recipe
from tests.encoders import EMBEDDING_BASES, save_encoder

__all__ = ["finished", "recipes"]

TEXTS = {
    "pairs": ["{question}", "{answer}"],
    "triplets": ["find: {question}", "{answer}", "{wrong}"],
}


def own_embeddings(run: Path, task: str) -> dict[str, np.ndarray]:
    """Adapter, or "base" -> the embeddings of all held-out texts of a task, [texts, 20, d]."""
    context, _ = load_run(str(run), with_tasks=True)
    split = context.tasks[task].validation
    assert isinstance(split, EmbeddingSplit)
    embed = Embedder(RowLosses(context.model), context.bank, context.collate, 500, context.pad_token)
    embeddings = {}
    names = {-1: "base"} | {i: spec.name for i, spec in enumerate(context.bank.specs) if spec.task == task}
    for adapter, name in names.items():
        rows = [
            Row(adapter, task, i, split.size(i, part), document=part)
            for part in range(split.spec.texts)
            for i in range(20)
        ]
        values = embed(rows, split, lambda share: None)
        embeddings[name] = values.reshape(split.spec.texts, 20, -1)
    return embeddings


def texts_of(task: str) -> list[list[str]]:
    rows = [triplet(number) for number in range(60, 80)]
    return [[template.format(**row) for row in rows] for template in TEXTS[task]]


def encoded(model: Any, texts: list[list[str]]) -> np.ndarray:
    return np.stack([model.encode(part, batch_size=7, show_progress_bar=False) for part in texts])


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("task", ["pairs", "triplets"])
def test_exported_folders_load_with_equal_embeddings(kind: str, task: str, finished: dict[str, Path]) -> None:
    run, texts = finished[kind], texts_of(task)
    expected = own_embeddings(run, task)
    for name, values in expected.items():
        if name == "base":
            continue
        model = SentenceTransformer(str(run / "adapters" / name), device="cpu")
        assert model.max_seq_length == 64
        np.testing.assert_allclose(encoded(model, texts), values, atol=1e-5)
        assert np.abs(values - expected["base"]).max() > 1e-3, name


@pytest.mark.parametrize("architecture", EMBEDDING_BASES)
@pytest.mark.quick("roberta", "modernbert")
def test_adapters_of_every_encoder_load_with_equal_embeddings(architecture: str, tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base", architecture)
    recipe = write_recipe(
        tmp_path, base, {"pairs": PAIRS, "triplets": TRIPLETS | {"pooling": "cls"}}, ADAPTERS
    )
    small = ["training.steps=4", "training.save_every=4", "evaluation.interval=4", "training.max_length=60"]
    run = Path(flora_train.train(load_config([f"recipe={recipe}", f"output_dir={tmp_path / 'run'}", *small])))
    for task in ("pairs", "triplets"):
        expected, texts = own_embeddings(run, task), texts_of(task)
        assert len(expected) == 1 + len(ADAPTERS)
        for name in expected.keys() - {"base"}:
            model = SentenceTransformer(str(run / "adapters" / name), device="cpu")
            np.testing.assert_allclose(encoded(model, texts), expected[name], atol=1e-5, err_msg=name)
            assert np.abs(expected[name] - expected["base"]).max() > 1e-4, name


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_folders_load_onto_a_model_and_in_plain_peft(
    kind: str, finished: dict[str, Path], recipes: dict[str, Path]
) -> None:
    """Other ways to use them: load_adapter on the base, and PeftModel on AutoModel."""
    run, texts = finished[kind], texts_of("pairs")
    expected = own_embeddings(run, "pairs")
    for name in ("pairs-lora", "pairs-flora", "pairs-ia3"):
        folder = run / "adapters" / name
        model = SentenceTransformer(str(folder), device="cpu")
        base = SentenceTransformer(str(folder), device="cpu")
        base.disable_adapters()
        np.testing.assert_allclose(encoded(base, texts), expected["base"], atol=1e-5)
        path = model[0].auto_model.peft_config["default"].base_model_name_or_path
        plain = PeftModel.from_pretrained(AutoModel.from_pretrained(path), str(folder)).eval()
        tokens = model.tokenizer(texts[0], padding=True, return_tensors="pt")
        tokens.pop("token_type_ids", None)
        with torch.no_grad():
            states = plain(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        means = (states * mask).sum(1) / mask.sum(1)
        np.testing.assert_allclose(means.numpy(), expected[name][0], atol=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("form", ["merged", "flora"])
def test_other_exports_load_with_equal_embeddings(
    kind: str, form: str, finished: dict[str, Path], tmp_path: Path
) -> None:
    run = finished[kind]
    out = tmp_path / "out"
    assert main(["export", str(run), "pairs-flora", "--as", form, "--out", str(out)]) == 0
    if form == "flora":
        import flora_train.peft_plugin  # noqa: F401  (registers FLORA with peft)
    model = SentenceTransformer(str(out / "pairs-flora"), device="cpu")
    expected = own_embeddings(run, "pairs")["pairs-flora"]
    np.testing.assert_allclose(encoded(model, texts_of("pairs")), expected, atol=1e-5)


def test_the_snippet_of_a_card_runs(
    finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished["decoder"] / "adapters" / "triplets-lora"
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent)
    exec(code, {})
    assert "tensor([[1.0000" in capsys.readouterr().out
    assert "library_name: sentence-transformers" in card
    assert "recall_at_1" in card or "recall at 1" in card


def test_the_code_of_the_documentation_runs(
    finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """That of docs/embeddings.md, on another adapter."""
    (block,) = blocks(ROOT / "docs" / "embeddings.md", "python")
    folder = finished["encoder"] / "adapters" / "pairs-lora"
    exec(block.text.replace("outputs/support/adapters/support-lora", str(folder)), {})
    assert "tensor([[1.0000" in capsys.readouterr().out


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("parts", [2, 3])
def test_the_loss_equals_that_of_sentence_transformers(parts: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(parts)]
    theirs = [part.detach().clone().requires_grad_() for part in own]
    texts = DrawTexts(*([f"{part} {i}" for i in range(6)] for part in range(parts)))
    values = contrastive_losses(DrawEmbeddings(*own), texts, temperature=0.05, symmetric=symmetric)
    values.mean().backward()
    kind = losses.MultipleNegativesSymmetricRankingLoss if symmetric else losses.MultipleNegativesRankingLoss
    loss = kind(model=torch.nn.Identity(), scale=20.0)
    expected = loss.compute_loss_from_embeddings(theirs, torch.empty(0))
    expected.backward()
    assert float(values.mean()) == pytest.approx(float(expected), rel=1e-9)
    for left, right in zip(own, theirs, strict=True):
        assert left.grad is not None
        assert right.grad is not None
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-7, atol=1e-10)
