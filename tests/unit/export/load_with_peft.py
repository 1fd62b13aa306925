"""A program without this package: load exported adapters as any user of PEFT would, and save their logits.

python load_with_peft.py FOLDER...

A folder holds base/, class (of transformers), inputs.safetensors and adapters/<name>/, and gets
logits.safetensors. heads.json, if there is one, has the class and the number of labels of each adapter.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any


class Refuse:
    """An import hook: whatever asks for flora_train fails."""

    def find_spec(self, name: str, *args: Any) -> None:
        if name.split(".")[0] == "flora_train":
            raise ImportError("this program must do without flora_train")


sys.meta_path.insert(0, Refuse())

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def main(*folders: str) -> None:
    torch.set_num_threads(2)
    for folder in map(Path, folders):
        inputs, auto_class = (
            load_file(folder / "inputs.safetensors"),
            getattr(transformers, (folder / "class").read_text()),
        )
        logits = {}
        heads = {}
        if (folder / "heads.json").exists():
            heads = json.loads((folder / "heads.json").read_text())
        for adapter in sorted((folder / "adapters").iterdir()):
            options = {}
            if adapter.name in heads:
                auto_class = getattr(transformers, heads[adapter.name][0])
                options["num_labels"] = heads[adapter.name][1]
            model = auto_class.from_pretrained(folder / "base", **options).eval()
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter(
                    "error", UserWarning
                )  # PEFT only warns where keys are missing or a layout is wrong
                logits[adapter.name] = PeftModel.from_pretrained(model, adapter).eval()(**inputs).logits
        save_file(logits, folder / "logits.safetensors")
    assert not [name for name in sys.modules if name.split(".")[0] == "flora_train"]


if __name__ == "__main__":
    main(*sys.argv[1:])
