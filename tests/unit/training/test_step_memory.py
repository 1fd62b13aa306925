"""Memory of a step from shapes alone, beside what autograd keeps on a CPU and what a GPU took."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    GPTBigCodeConfig,
    LlamaConfig,
    Olmo2Config,
    Qwen2Config,
    Starcoder2Config,
    WhisperConfig,
)

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.pool import PLANES, Pool, build_pools
from flora_train.adapters.spec import AdapterSpec, make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.model_schema import ModelConfig
from flora_train.models.loading import empty_model
from flora_train.training.fsdp import layers_of
from flora_train.training.gpu_memory import base_bytes
from flora_train.training.step_memory import BatchShape, measure_shapes
from tests.architectures import ARCHITECTURES, tiny_model

GPU_FIGURES = Path(__file__).parents[3] / "benchmarks" / "results" / "large_step_cuda.md"
ROWS, LENGTH = 6, 128
BFLOAT16 = 2


def specs_of(method: str, count: int, **keys: Any) -> list[AdapterSpec]:
    config = AdapterConfig(method=method, lr=1e-3, **keys)  # type: ignore[arg-type]
    return [make_spec(f"task{k}", method, config, default_steps=10) for k in range(count)]


def pools_in(folder: Path, config: Any, specs: list[AdapterSpec]) -> list[Pool]:
    config.save_pretrained(folder)
    pools, _ = build_pools(empty_model(ModelConfig(path=str(folder))), specs)
    return pools


def llama_sizes(**sizes: int) -> dict[str, int]:
    return {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        **sizes,
    }


TEXT = {
    "gpt_bigcode": GPTBigCodeConfig(
        n_embd=256,
        n_layer=3,
        n_head=4,
        n_inner=1024,
        n_positions=128,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "starcoder2": Starcoder2Config(**llama_sizes(), bos_token_id=0, eos_token_id=0),
    "qwen2": Qwen2Config(**llama_sizes()),
    "llama": LlamaConfig(**llama_sizes()),
    "olmo2": Olmo2Config(**llama_sizes(), pad_token_id=0, bos_token_id=0, eos_token_id=0),
}


IA3_TARGETS: dict[str, Any] = {
    "olmo2": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
}
"""Where PEFT has no default."""


def kept_on_cpu(model: Any, specs: list[AdapterSpec], inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd keeps in a real forward in bfloat16."""
    bank = AdapterBank.attach(model, specs)
    bank.route(sorted(row % len(specs) for row in range(ROWS)))  # as in a run
    own = [*model.parameters(), *bank.tensors().values()]
    ignored = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model.base_model(**inputs, use_cache=False)
    assert outputs.last_hidden_state.requires_grad
    return sum(size for address, size in storages.items() if address not in ignored)


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("model_type", TEXT)
def test_a_text_model_keeps_what_its_shapes_say(model_type: str, method: str, tmp_path: Path) -> None:
    config = TEXT[model_type]
    keys: dict[str, Any] = {"rank": 2} if method == "lora" else {}
    specs = specs_of(method, 3, target_modules="all-linear", **keys)
    if method == "ia3":
        specs = specs_of(method, 3, **IA3_TARGETS.get(model_type, {}))
    pools = pools_in(tmp_path, config, specs)
    memory = measure_shapes(ModelConfig(path=str(tmp_path)), pools, BatchShape(ROWS, LENGTH))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    mask = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool)
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    measured = kept_on_cpu(model, specs, {"input_ids": ids, "attention_mask": mask})
    assert memory.kept == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("expert", ["lora", "ia3"])
@pytest.mark.parametrize("model_type", ["llama", "starcoder2"])
def test_experts_keep_what_their_shapes_say(model_type: str, expert: str, tmp_path: Path) -> None:
    """Of three adapters, two are routed; 2 of 8 experts compute a token."""
    config = TEXT[model_type]
    keys: dict[str, Any] = {"rank": 2} if expert == "lora" else {}
    specs = [
        *specs_of("mixlora", 2, expert=expert, target_modules="all-linear", **keys),
        *specs_of("lora", 1, target_modules="all-linear", rank=2),
    ]
    pools = pools_in(tmp_path, config, specs)
    memory = measure_shapes(ModelConfig(path=str(tmp_path)), pools, BatchShape(ROWS, LENGTH))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    mask = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool)
    ids = torch.randint(0, 60, (ROWS, LENGTH))
    measured = kept_on_cpu(model, specs, {"input_ids": ids, "attention_mask": mask})
    assert memory.kept == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("expert", "layers"), [("lora", 0), ("ia3", 0), ("flora", 3)])
def test_operations_of_experts(expert: str, layers: int, tmp_path: Path) -> None:
    """Every layer once for a token, whatever top_k is, except by fLoRA experts."""
    flops = []
    for options in ({"experts": 4, "top_k": 1}, {"experts": 4, "top_k": 3}):
        keys: dict[str, Any] = {} if expert == "ia3" else {"rank": 2}
        specs = specs_of("mixlora", 2, expert=expert, target_modules="all-linear", **keys, **options)
        pools = pools_in(tmp_path, TEXT["llama"], specs)
        memory = measure_shapes(ModelConfig(path=str(tmp_path)), pools, BatchShape(ROWS, LENGTH))
        flops.append(memory.flops)
    layer = 2 * ROWS * LENGTH * 256 * 640 * 3  # one linear layer of the feed-forward blocks, in all of them
    assert flops[1] - flops[0] == layer * 2 * layers


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("t5", "whisper")])
def test_every_architecture_is_planned(name: str, tmp_path: Path) -> None:
    pools = pools_in(tmp_path, tiny_model(name).config, specs_of("flora", 2, rank=2))
    memory = measure_shapes(ModelConfig(path=str(tmp_path)), pools, BatchShape(4, 16))
    assert 0 < memory.in_layers < memory.kept
    assert memory.flops > 0


def test_a_base_in_float32_keeps_twice_as_much(tmp_path: Path) -> None:
    pools = pools_in(tmp_path, TEXT["llama"], specs_of("lora", 2, rank=2))
    kept = [
        measure_shapes(ModelConfig(path=str(tmp_path), dtype=dtype), pools, BatchShape(ROWS, LENGTH)).kept
        for dtype in ("auto", "bfloat16", "float32")
    ]
    assert kept[0] == kept[1]
    assert 1.4 < kept[2] / kept[1] <= 2.1


def test_a_speech_model_keeps_what_its_shapes_say(tmp_path: Path) -> None:
    sizes = {"encoder_layers": 3, "decoder_layers": 2, "d_model": 128, "vocab_size": 60}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = WhisperConfig(
        **sizes, **heads, **tokens, encoder_ffn_dim=512, decoder_ffn_dim=512, max_source_positions=100
    )
    specs = specs_of("lora", 3, rank=2)
    pools = pools_in(tmp_path, config, specs)
    memory = measure_shapes(ModelConfig(path=str(tmp_path)), pools, BatchShape(ROWS, 8, 100))
    model = AutoModelForSpeechSeq2Seq.from_config(config, dtype=torch.bfloat16).eval()
    features = torch.zeros(ROWS, config.num_mel_bins, 200, dtype=torch.bfloat16)
    ids = torch.ones(ROWS, 8, dtype=torch.long)
    measured = kept_on_cpu(model, specs, {"input_features": features, "decoder_input_ids": ids})
    assert memory.kept == pytest.approx(measured, rel=0.1)


def test_checkpointing_keeps_the_inputs_of_layers(tmp_path: Path) -> None:
    pools = pools_in(tmp_path, TEXT["llama"], specs_of("lora", 3, rank=2))
    config = ModelConfig(path=str(tmp_path))
    memory = measure_shapes(config, pools, BatchShape(ROWS, LENGTH))
    assert memory.inputs == 3 * ROWS * LENGTH * 256 * BFLOAT16
    assert memory.largest_layer == pytest.approx(memory.in_layers / 3, rel=0.05)
    whole = memory.of_rows(ROWS, checkpointing=False)
    assert memory.of_rows(ROWS, checkpointing=True) < whole
    assert memory.of_rows(2 * ROWS, checkpointing=False) == pytest.approx(2 * whole, abs=1)
    parameters = sum(p.numel() for layer in layers_of(empty_model(config)) for p in layer.parameters())
    assert memory.flops == pytest.approx(2 * ROWS * LENGTH * parameters, rel=0.15)  # and attention


@pytest.mark.parametrize("method", ["lora", "flora"])
def test_the_step_of_the_committed_gpu_figures_is_planned_not_too_low(method: str, tmp_path: Path) -> None:
    """StarCoder2-3B, 8 adapters of rank 16 on every linear layer, 512 tokens each, on an H100."""
    figure = re.search(rf"\| 8 \| ours, {method}(?:, split)? \| \d+ \| ([\d.]+) \|", GPU_FIGURES.read_text())
    assert figure is not None
    config = AutoConfig.for_model(
        "starcoder2",
        hidden_size=3072,
        intermediate_size=12288,
        num_hidden_layers=30,
        num_attention_heads=24,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]
    pools = pools_in(tmp_path, config, specs_of(method, 8, rank=16, target_modules=targets))
    path = ModelConfig(path=str(tmp_path))
    memory = measure_shapes(path, pools, BatchShape(8, 512))
    adapters = 4 * PLANES * sum(len(pool.specs) * pool.row_size for pool in pools)
    base = base_bytes(empty_model(path), BFLOAT16, "none")
    gathered = 4 * sum(len(pool.specs) * pool.row_size for pool in pools)
    planned = base + adapters + gathered + memory.of_rows(8, checkpointing=False)
    assert 1.0 <= planned / 2**30 / float(figure[1]) <= 1.15
