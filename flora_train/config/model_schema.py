"""The base model: where it is, its number format, quantization and sharding."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationInfo, field_validator

from flora_train.config.base import ConfigModel, PathText, Revision


class ModelConfig(ConfigModel):
    path: PathText
    """Folder of a transformers checkpoint, or a name on the Hugging Face hub."""
    revision: Revision = None
    """Branch, tag or commit on the hub. Default: the hub's main branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the frozen base model. auto: bfloat16 where the hardware multiplies it faster, else
    float32."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the frozen base model through bitsandbytes (needs a CUDA GPU). 8bit: LLM.int8 without its outlier
    split, which would make a row's result depend on the other rows of the batch. 4bit: NF4. fLoRA dequantizes
    the weight of a layer in the forward and again in the backward pass."""
    fsdp: bool = False
    """Shard the frozen base model over the processes (FSDP2) instead of loading all of it in each: less
    memory, more communication. A layer is gathered when it runs. For text models only. Generating text
    (sample prompts, programming problems) gathers the whole model on every process."""
    gradient_checkpointing: Literal["off", "reentrant", "non_reentrant"] = "off"
    """Recompute activations in the backward pass, which saves memory and costs one more forward pass."""
    attn_implementation: str | None = None
    """Attention implementation of transformers: eager, sdpa or flash_attention_2. Default: the one that
    transformers chooses."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""

    @field_validator("fsdp")
    @classmethod
    def _is_not_quantized(cls, fsdp: bool, info: ValidationInfo) -> bool:
        quantization = info.data.get("quantization", "none")
        if fsdp and quantization != "none":
            raise ValueError(
                f"cannot shard a base model in {quantization}: set model.quantization=none, or fsdp=false"
            )
        return fsdp
