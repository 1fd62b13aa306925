"""Do the Triton kernels fit the chips they are for? Compiled ahead of time, on any Linux machine, without a GPU.

Prints registers, spilled bytes and shared memory of every kernel, type, rank and chip; exits with 1 if one spills or needs more
shared memory than the chip has. Nothing here says how fast they are. Usage: python benchmarks/compile_kernels.py [--save]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flora_train.kernels import flora_triton as kernels

RESULT = Path(__file__).parent / "results" / "compiled_kernels.md"
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # CUDA C++ Programming Guide, technical specifications per compute capability
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RANKS = (4, 16, 64)
INTEGERS = "i32"
FEATURES = 4096


@dataclass(frozen=True)
class Compiled:
    kernel: str
    dtype: str
    rank: int
    capability: int
    registers: int
    spilled: int
    shared: int

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_BYTES[self.capability]


def variants(dtype: str, rank: int) -> dict[str, tuple[Any, set[str], dict[str, Any]]]:
    """name -> (kernel, names of pointers to x's type, constants)."""
    constants = kernels.tuning(DTYPES[dtype], rank)
    del constants["num_warps"]
    matmul = constants | {
        "TOKENS": kernels.BLOCK_TOKENS,
        "FEATURES": kernels.BLOCK_FEATURES,
        "SUMMED": kernels.BLOCK_SUMMED,
        "SPLIT": dtype != "fp32",
    }
    tile = kernels.gradient_tile(DTYPES[dtype], rank)
    gradients = constants | {"TOKENS": kernels.BLOCK_SUMMED, "OUT": tile, "IN": tile}
    forward = {"weight_feature": FEATURES, "weight_summed": 1, "left_rank": 1, "right_summed": 1}
    backward = {"weight_feature": 1, "weight_summed": FEATURES, "left_feature": 1, "right_rank": 1}
    types = {"x", "weight", "y", "dy"}
    return {
        "y": (kernels._modulated_matmul, types, matmul | forward),
        "dX": (kernels._modulated_matmul, types, matmul | backward | {"SPLIT": False}),
        "dA, dB": (kernels._adapter_gradients, types, gradients),
    }


POINTERS = {
    "left": "*fp32",
    "right": "*fp32",
    "offset": "*fp32",
    "A": "*fp32",
    "B": "*fp32",
    "dA": "*fp32",
    "dB": "*fp32",
} | dict.fromkeys(("blocks", "bounds"), "*i32")


def compile_one(name: str, dtype: str, rank: int, capability: int) -> Compiled:
    kernel, typed, constants = variants(dtype, rank)[name]
    warps = kernels.tuning(DTYPES[dtype], rank)["num_warps"]
    signature = {
        argument: "constexpr" if argument in constants else f"*{dtype}" if argument in typed else POINTERS.get(argument, INTEGERS)
        for argument in kernel.arg_names
    }
    aligned = {"features", "summed", "in_features", "out_features", "x_token", "y_token", "weight_feature", "weight_summed"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, type_) in enumerate(signature.items())
        if type_.startswith("*") or (argument in aligned and type_ == INTEGERS)
    }
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    registers, spilled = resources(compiled.asm["ptx"], capability)
    return Compiled(name, dtype, rank, capability, registers, spilled, compiled.metadata.shared)


def resources(ptx: str, capability: int) -> tuple[int, int]:
    """(registers, spilled bytes) by ptxas."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        words = [str(ptxas), "-v", f"--gpu-name={arch}", str(file), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill stores", said)
    assert registers is not None, said
    return int(registers[1]), sum(map(int, spilled))


def table(found: list[Compiled]) -> list[str]:
    """Markdown."""
    lines = ["| kernel | type | rank | chip | registers | spilled bytes | shared KiB (of) |", "|---" * 7 + "|"]
    for c in found:
        shared = f"{c.shared / 1024:.0f} ({SHARED_BYTES[c.capability] >> 10})"
        lines.append(f"| {c.kernel} | {c.dtype} | {c.rank} | sm_{c.capability} | {c.registers} | {c.spilled} | {shared} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    found = [
        compile_one(kernel, dtype, rank, capability)
        for capability in SHARED_BYTES
        for dtype in DTYPES
        for rank in RANKS
        for kernel in variants(dtype, rank)
    ]
    heading = [
        "# The Triton kernels, compiled",
        "",
        f"triton {triton.__version__}, blocks of {kernels.BLOCK_TOKENS} tokens x {kernels.BLOCK_FEATURES} features, "
        f"{kernels.BLOCK_SUMMED} summed at a time. `python benchmarks/compile_kernels.py --save` prints this file.",
        "",
    ]
    text = "\n".join([*heading, *table(found)]) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text)
    return int(not all(c.fits for c in found))


if __name__ == "__main__":
    sys.exit(main())
