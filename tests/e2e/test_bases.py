"""`recipe=multipl_e model.path=NAME` on the layouts of younger code models, without a further key.

Each layout is a tiny model with random weights (tests/bases.py); data and lengths are small and local.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import expand
from flora_train.adapters.targets import endings, find_targets
from flora_train.config.load import load_config
from flora_train.config.model_schema import ModelConfig
from flora_train.data.batch import Row, collate
from flora_train.data.packing import pack
from flora_train.data.templates import PromptCompletion
from flora_train.data.token_split import TokenSplit
from flora_train.data.tokenization import pad_token, tokenize
from flora_train.evaluation.generation import complete
from flora_train.export.usage_snippet import GenerationExample, usage_snippet
from flora_train.models.context_length import max_readable_length
from flora_train.models.loading import (
    load_base_model,
    load_model_config,
    load_tokenizer,
    tokenizer_in_code,
)
from flora_train.run_context import load_run
from flora_train.training.loss import RowLosses
from flora_train.training.row_check import check_rows
from tests.base_tokenizers import code
from tests.bases import LAYOUTS, save_base
from tests.conftest import perturb, spec
from tests.e2e.conftest import Launch
from tests.forked import ROOT

CPU = torch.device("cpu")
ODD = ("x = 10\n    1,\n  2", "\tif x == 123 then\n\n\n", "caf\u00e9 \u65e5\u672c\u8a9e \u0440\u0443\u0441")
LANGUAGES = ("lua", "perl", "ruby")
ALL = pytest.mark.parametrize("name", LAYOUTS)
QUICK = pytest.mark.quick("starcoder2", "deepseek-coder")
EQUAL = 1e-5
"""Largest relative difference of logits and losses that are computed in two ways."""
ABSENT = -2
"""In place of the number of an adapter: the row is not in the batch."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_base(name, folder / name) for name in LAYOUTS}


@pytest.fixture
def base(name: str, bases: dict[str, Path]) -> ModelConfig:
    return ModelConfig(path=str(bases[name]), dtype="float32")


def attached(base: ModelConfig) -> tuple[AdapterBank, Any]:
    """The recipe's methods on a base, away from the identity, and its tokenizer."""
    options: dict[str, Any] = {"target_modules": "query-key"}
    specs = [
        spec("flora", "a", rank=1, variant="pure", **options),
        spec("flora", "b", "flora_rank4", rank=4, variant="pure", **options),
        spec("lora", "a", rank=1, **options),
        spec("ia3", "a", **options),
    ]
    bank = AdapterBank.attach(load_base_model(base, CPU), specs)
    perturb(bank, 0.3)
    return bank, load_tokenizer(base)


def row(examples: TokenSplit, example: int, adapter: int) -> Row:
    return Row(adapter, "code", example, int(examples.lengths[example]))


@ALL
def test_tokens_are_those_of_the_published_files(name: str, base: ModelConfig) -> None:
    """Whatever pipeline transformers builds for the class that the repository names."""
    tokenizer, layout = load_tokenizer(base), LAYOUTS[name]
    published = Tokenizer.from_file(f"{base.path}/tokenizer.json")
    texts = [*code(), *ODD]
    ours = tokenizer(texts, add_special_tokens=False)["input_ids"]
    theirs = published.encode_batch(texts, add_special_tokens=False)
    assert ours == [encoding.ids for encoding in theirs]
    (text,) = tokenize([PromptCompletion("", texts[0])], tokenizer, 4096, truncation="drop").documents(0)
    tokens = tokenizer.convert_ids_to_tokens(text[0].tolist())
    assert (*tokens[: len(layout.start)], tokens[-1]) == (*layout.start, layout.end)
    assert tokens.count(layout.end) == 1
    assert tokenizer.convert_ids_to_tokens(pad_token(tokenizer)) == (layout.pad or layout.end)


@ALL
def test_program_of_a_card_reads_texts_as_training_does(name: str, base: ModelConfig) -> None:
    class_name, options = tokenizer_in_code(base)
    assert class_name == ("PreTrainedTokenizerFast" if name == "starcoder2" else "AutoTokenizer")
    assert options == (", add_bos_token=True" if name == "deepseek-coder" else "")
    read_options = dict.fromkeys(("add_bos_token",) if options else (), True)
    theirs = getattr(transformers, class_name).from_pretrained(base.path, **read_options)
    texts = [*code(), *ODD]
    assert theirs(texts)["input_ids"] == load_tokenizer(base)(texts)["input_ids"]
    example = GenerationExample("x", 8, tokenizer=(class_name, options))
    config = {"base_model_name_or_path": "some/base", "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    snippet = usage_snippet(config, example, source="some/adapter")
    assert f'tokenizer = {class_name}.from_pretrained("some/base"{options})' in snippet
    assert f"from transformers import AutoModelForCausalLM, {class_name}" in snippet


@ALL
def test_default_layers_of_each_method(name: str, base: ModelConfig) -> None:
    layout, model = LAYOUTS[name], load_base_model(base, CPU)
    for method in ("flora", "lora", "ia3"):
        group = find_targets(model, spec(method, target_modules="query-key"))
        assert endings(group) == list(layout.query_key)
        assert not any(target.feedforward for target in group.values())
    ia3 = find_targets(model, spec("ia3")).values()
    assert endings(target.name for target in ia3 if not target.feedforward) == list(layout.ia3)
    assert [target.name.rpartition("mlp.")[2] for target in ia3 if target.feedforward] == [
        layout.ia3_inputs
    ] * 2
    everything = find_targets(model, spec("lora"))
    head = model.get_output_embeddings()  # type: ignore[operator]
    assert all(model.get_submodule(name) is not head for name in everything)
    assert (head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings


@ALL
@QUICK
def test_rows_of_packed_documents_depend_on_themselves_alone(name: str, base: ModelConfig) -> None:
    """Losses of documents in one sequence, beside rows of other adapters, are those of each one alone."""
    bank, tokenizer = attached(base)
    check_rows(bank.model, pad_token(tokenizer))
    texts = [PromptCompletion("", text[:90]) for text in list(code())[:6]]
    split = tokenize(texts, tokenizer, 128, truncation="truncate")
    packed = pack(split, 128)
    assert len(packed) < len(split)
    losses = RowLosses(bank.model)

    def loss_of(examples: TokenSplit, rows: list[Row]) -> Tensor:
        batch = collate(rows, lambda task: examples, pad_token(tokenizer))
        bank.route([row.adapter for row in rows])
        return losses(batch)

    adapters = [*range(len(bank.specs)), -1]
    mixed = [row(packed, example, adapter) for example in range(len(packed)) for adapter in adapters]
    together = loss_of(packed, mixed).reshape(len(packed), -1).sum(0)
    for adapter, total in zip(adapters, together.tolist(), strict=True):
        alone = [loss_of(split, [row(split, example, adapter)]).item() for example in range(len(split))]
        assert sum(alone) == pytest.approx(total, rel=EQUAL)
    assert len({round(total, 3) for total in together.tolist()}) == len(adapters)


@ALL
@QUICK
def test_adapter_learns_as_if_alone(name: str, base: ModelConfig) -> None:
    bank, tokenizer = attached(base)
    texts = [PromptCompletion("", text[:120]) for text in list(code())[:4]]
    split = tokenize(texts, tokenizer, 64, truncation="truncate")
    losses = RowLosses(bank.model)

    def gradient(adapter: int, adapters: list[int]) -> Tensor:
        rows = [row(split, example, other) for example, other in enumerate(adapters) if other != ABSENT]
        for pool in bank.pools:
            pool.gradients.zero_()
        bank.route([row.adapter for row in rows])
        losses(collate(rows, lambda task: split, pad_token(tokenizer))).sum().backward()
        return bank.gradient_row(adapter).clone()

    for adapter in range(len(bank.specs)):
        others = [other for other in range(len(bank.specs)) if other != adapter]
        together = gradient(adapter, [adapter, others[0], adapter, others[1]])
        alone = gradient(adapter, [adapter, ABSENT, adapter, ABSENT])
        assert alone.norm() > 0
        assert (together - alone).norm() <= 1e-4 * alone.norm()


@ALL
@QUICK
def test_generation_stops_at_the_end_of_text(name: str, base: ModelConfig) -> None:
    """Its texts are those of the model's own generate, which reads the end token from the configuration."""
    bank, tokenizer = attached(base)
    model: Any = bank.model
    model.generation_config.pad_token_id = pad_token(tokenizer)
    head = model.get_output_embeddings()
    end = tokenizer.eos_token_id
    assert model.config.eos_token_id == end
    prompt = "function add(a, b)\n"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    for stops in (False, True):
        if stops:  # the end token follows whatever was written
            with torch.no_grad(), bank.routed([0]):
                states = model.model(ids).last_hidden_state[0, -1]
            head.weight[end] = states * 100
        (ours,) = complete(model, bank, tokenizer, requests=[(prompt, 0)], max_new_tokens=8)
        with bank.routed([0]):
            theirs = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
            )
        written = theirs[0, ids.shape[1] :]
        assert (int(written[0]) == end) == stops
        assert (
            ours
            == tokenizer.decode(theirs[0], skip_special_tokens=True)[
                len(tokenizer.decode(ids[0], skip_special_tokens=True)) :
            ]
        )


@ALL
def test_recipe_s_length_is_within_the_context(name: str, base: ModelConfig) -> None:
    config = load_config(["recipe=multipl_e", f"model.path={base.path}"])
    assert len(expand(config)) == 27
    length = config.training.max_length
    assert max_readable_length(base, load_model_config(base), length) is None


@ALL
def test_recipe_names_the_base(name: str) -> None:
    assert LAYOUTS[name].path in (ROOT / "recipes" / "multipl_e.yaml").read_text(encoding="utf-8")


@ALL
@QUICK
def test_recipe_trains_and_plain_peft_loads_what_it_exports(
    name: str, base: ModelConfig, launch: Launch, tmp_path: Path
) -> None:
    """Beside model.path, the keys of data, languages and lengths differ from the recipe."""
    folder = tmp_path / "run"
    done = launch(
        "recipe=multipl_e", f"model.path={base.path}", *local_data(tmp_path), f"output_dir={folder}"
    )
    assert done.returncode == 0, done.stderr
    context, best = load_run(str(folder))
    assert len(best) == len(context.bank.ids) == 7
    ids = torch.arange(9, 41)[None]
    copytree(base.path, tmp_path / "peft" / "base")
    config = tmp_path / "peft" / "base" / "config.json"
    config.write_text(config.read_text().replace("bfloat16", "float32"))
    copytree(folder / "adapters", tmp_path / "peft" / "adapters")
    save_file({"input_ids": ids}, tmp_path / "peft" / "inputs.safetensors")
    (tmp_path / "peft" / "class").write_text("AutoModelForCausalLM")
    script = ROOT / "tests" / "unit" / "export" / "load_with_peft.py"
    program = [sys.executable, str(script), str(tmp_path / "peft")]
    loaded = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    theirs = load_file(tmp_path / "peft" / "logits.safetensors")
    assert theirs.keys() == context.bank.ids.keys()
    class_name, options = tokenizer_in_code(base)
    card = (folder / "adapters" / "perl-lora" / "README.md").read_text(encoding="utf-8")
    assert f'tokenizer = {class_name}.from_pretrained("{base.path}"{options})' in card
    with torch.no_grad():
        plain = load_base_model(base, CPU)(input_ids=ids).logits
        for adapter, logits in theirs.items():
            with context.bank.routed([adapter]):
                ours = context.model(input_ids=ids).logits
            assert (ours - logits).abs().max() <= EQUAL * ours.abs().max()
            assert (ours - plain).abs().max() > 1e-4
            written = json.loads((folder / "adapters" / adapter / "adapter_config.json").read_text())
            assert sorted(written["target_modules"]) == list(LAYOUTS[name].query_key)


def local_data(folder: Path) -> list[str]:
    """Keys of three languages, their local data, and short lengths."""
    words = [
        "adapters.flora.tasks=[perl,ruby]",
        "adapters.flora_rank4.tasks=[lua]",
        "adapters.lora.tasks=[perl]",
        "adapters.lora_rank4.tasks=[lua]",
        "adapters.ia3.tasks=[lua,perl]",
        "training.steps=4",
        "training.max_length=96",
        "training.tokens_per_step=1500",
        "training.tokens_per_microbatch=384",
        "evaluation.interval=2",
        "evaluation.max_examples=4",
        "evaluation.problems=[]",
        "mixture.examples_per_draw=1",
    ]
    for language in LANGUAGES:
        rows = []
        for line in (
            (ROOT / f"assets/code/{language}.train.jsonl").read_text(encoding="utf-8").splitlines()[:60]
        ):
            row = json.loads(line)
            rows.append(json.dumps({"content": row["prompt"] + row["completion"]}))
        file = folder / f"{language}.jsonl"
        file.write_text("\n".join(rows), encoding="utf-8")
        words.append(f"tasks.{language}.train={file}")
    return words
