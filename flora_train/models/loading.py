"""How is the frozen base model loaded?"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from flora_train.config.errors import first_line, user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.config.paths import IS_CHECKOUT, PROJECT_ROOT, find_file
from flora_train.config.schema import RunConfig
from flora_train.models.speech_encoder import is_speech_model, is_whisper, take_short_windows


def load_tokenizer(config: ModelConfig) -> Any:
    """The base model's tokenizer. Raises UserError if the folder or hub name cannot be read."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, config)


def load_feature_extractor(config: ModelConfig) -> Any:
    """What makes a speech model's features."""
    from transformers import AutoFeatureExtractor

    return _from_pretrained(AutoFeatureExtractor, config)


def load_preprocessors(config: ModelConfig, tokenizer: Any) -> list[Any]:
    """The objects that are saved beside a model so that transformers can use it: its tokenizer, and of a speech model the processor
    and the feature extractor."""
    from transformers import AutoProcessor

    if not is_speech_model(load_model_config(config)):
        return [tokenizer]
    return [_from_pretrained(AutoProcessor, config), tokenizer, load_feature_extractor(config)]


def check_kind(model_config: Any, config: RunConfig) -> None:
    """Raises UserError where the tasks are speech and the model reads text, or the other way round."""
    spoken = any(task.speech is not None for task in config.tasks.values())
    if spoken and not is_speech_model(model_config):
        hint = (
            f"is a {model_config.model_type} model, and the tasks are speech: give an encoder-decoder of speech, such as Whisper"
        )
        raise user_error("model.path", config.model.path, hint)
    if spoken and config.audio.spec_augment and not is_whisper(model_config):
        raise user_error(
            "audio.spec_augment", True, f"is for Whisper's features, and the model is a {model_config.model_type}: leave it off"
        )
    if spoken and config.model.fsdp:
        raise user_error("model.fsdp", True, "is for text models: leave a speech model whole on every process")
    if not spoken and is_speech_model(model_config):
        hint = "is a speech model: its tasks need tasks.NAME.speech (docs/speech.md)"
        raise user_error("model.path", config.model.path, hint)


def load_model_config(config: ModelConfig) -> Any:
    """The base model's own configuration, as published."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, config)


def load_base_model(config: ModelConfig, device: torch.device) -> nn.Module:
    """The base model on `device`, frozen, its own dropout off: regularisation is each adapter's business, and a mask
    drawn for the whole batch would make an adapter's training depend on its neighbours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model_config = load_model_config(config)
    without_dropout(model_config)
    options: dict[str, Any] = {"config": model_config, "dtype": resolve_dtype(config.dtype, device)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization != "none":
        options |= {"quantization_config": _quantiser(config, options["dtype"]), "device_map": {"": device}}
    model, loaded = _from_pretrained(_auto_class(model_config), config, output_loading_info=True, **options)
    # transformers only warns, and draws what is missing at random
    if missing := sorted(loaded["missing_keys"] & {name for name, _ in model.named_parameters()}):
        hint = (
            f"has no weights for {missing[0]}, and {len(missing) - 1} more"
            if len(missing) > 1
            else f"has no weights for {missing[0]}"
        )
        raise user_error("model.path", config.path, f"{hint}: its files do not belong together, or one is missing")
    if config.quantization == "none":
        model = model.to(device)
    return _made_ready(model, config, model_config)


def _made_ready(model: Any, config: ModelConfig, model_config: Any) -> nn.Module:
    """Frozen, and as a run wants it."""
    if config.gradient_checkpointing != "off":
        reentrant = config.gradient_checkpointing == "reentrant"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if is_whisper(model_config):
        take_short_windows(model)
    return model.requires_grad_(False)


def check_quantiser(config: ModelConfig, device: torch.device) -> None:
    """Raises UserError where model.quantization cannot run."""
    if config.quantization == "none":
        return
    if device.type != "cuda":
        hint = f"needs a CUDA GPU, and this run is on {device.type}: leave it at none (model.dtype=bfloat16 halves the base)"
        raise user_error("model.quantization", config.quantization, hint)
    if find_spec("bitsandbytes") is None:
        raise user_error("model.quantization", config.quantization, "needs bitsandbytes: pip install 'flora-train[quantised]'")


def _quantiser(config: ModelConfig, dtype: torch.dtype) -> Any:
    """transformers' word for model.quantization."""
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type of a base that `model.dtype` names; auto: bfloat16 where the device multiplies it faster than float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if multiplies_bfloat16_fast(device) else torch.float32


def multiplies_bfloat16_fast(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 faster than float32: Ampere and later, AMX, AVX512-BF16 of AMD. The only question
    about the machine that `model.dtype=auto` asks; tests replace the answer."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # without AMX, Intel's processors multiply bfloat16 slower than float32
        return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not _is_intel())
    return False


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _from_pretrained(auto_class: Any, source: ModelConfig, **options: Any) -> Any:
    local = find_file(source.path)
    if not local.exists():
        looks_local = source.path.startswith((".", "/", "~")) or source.path.count("/") > 1
        if looks_local:
            raise user_error("model.path", source.path, f"no such folder{_how_to_build(source.path)}")
    try:
        return auto_class.from_pretrained(
            str(local) if local.exists() else source.path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            **options,
        )
    except Exception as error:  # transformers and the readers below it each have their own for a file that is damaged
        reason = _reason(error)
        offline = os.environ.get("HF_HUB_OFFLINE") == "1" and not local.exists()
        hint = "is no folder here and not in the hub's cache, and HF_HUB_OFFLINE=1 forbids to fetch it: give a local folder, or unset it"
        raise user_error("model.path", source.path, hint if offline else f"cannot be loaded: {reason}") from error


def _how_to_build(path: str) -> str:
    builder = {"smollm2-135m": "build_smollm2.py", "whisper-base": "build_whisper.py"}.get(Path(path).name)
    if builder is None:
        return ""
    script = f"assets/{builder}" if IS_CHECKOUT else f"{PROJECT_ROOT / 'assets' / builder} --output {path}"
    return f"; build it with: python {script}"


def empty_model(config: ModelConfig) -> nn.Module:
    """The base model's modules without numbers (on the meta device), for questions about its shape."""
    published = load_model_config(config)
    with torch.device("meta"):
        return _from_config(published, config)


def _from_config(published: Any, config: ModelConfig, **options: Any) -> nn.Module:
    """A model of this configuration with random numbers. Raises UserError if there is none."""
    try:
        model: nn.Module = _auto_class(published).from_config(published, trust_remote_code=config.trust_remote_code, **options)
    except Exception as error:
        raise user_error("model.path", config.path, f"cannot be loaded: {_reason(error)}") from error
    return model


def _reason(error: Exception) -> str:
    """What was wrong with a model's files, in one line."""
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says"
    known = isinstance(error, (OSError, ValueError, ImportError, SafetensorError))
    return first_line(error) if known else f"one of its files is damaged ({type(error).__name__}: {first_line(error)})"


def shallow_model(config: ModelConfig, layers: int, device: torch.device) -> nn.Module:
    """A model of this shape with so many layers (an encoder and a decoder: each) and random numbers: what a layer costs."""
    published = _shallow_config(config, layers)
    options: dict[str, Any] = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    model = _from_config(published, config, dtype=resolve_dtype(config.dtype, device), **options)
    return _made_ready(model.to(device), config, published)


def _shallow_config(config: ModelConfig, layers: int) -> Any:
    """The published configuration with so many layers."""
    published = load_model_config(config)
    without_dropout(published)
    text = published.get_text_config(decoder=True)
    for part in {id(part): part for part in (published, text)}.values():
        for key in LAYER_COUNTS & vars(part).keys():
            setattr(part, key, layers)
        for key, value in vars(part).items():
            if key in ("layer_types", "attention_layers") and isinstance(value, list):  # what each layer is
                setattr(part, key, value[:layers])
    return published


def zero_model(config: ModelConfig, layers: int | None = None) -> nn.Module:
    """A model of this shape (with so many layers) on the CPU, whose numbers are all 0: what runs in it, and up to which length. Its
    memory is not touched before it is written to."""
    published = load_model_config(config) if layers is None else _shallow_config(config, layers)
    without_dropout(published)
    with torch.device("meta"):
        empty = _from_config(published, config, dtype=torch.float32)
    return _made_ready(empty._apply(lambda tensor: torch.zeros_like(tensor, device="cpu")), config, published)


LAYER_COUNTS = {
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
}


def count_layers(config: ModelConfig) -> int:
    """Layers of the published model; of an encoder and a decoder the mean."""
    published = load_model_config(config)
    encoder, decoder = (getattr(published, key, None) for key in ("encoder_layers", "decoder_layers"))
    if isinstance(encoder, int) and isinstance(decoder, int) and encoder + decoder > 0:
        return round((encoder + decoder) / 2)
    count = getattr(published.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise user_error("model.path", config.path, f"says in its config.json that it has {count!r} layers: the file is damaged")
    return count


def _auto_class(model_config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq

    return AutoModelForSpeechSeq2Seq if is_speech_model(model_config) else AutoModelForCausalLM


def set_mode(model: nn.Module, training: bool) -> None:
    """Training or evaluation mode of a frozen base. In training mode are only modules that checkpoint activations, which depends on
    it: in others it means random numbers (dropout, noise of routers) and batch norms, which make rows depend on their neighbours."""
    model.train(training)
    for module in model.modules() if training else ():
        module.training = module is model or hasattr(module, "gradient_checkpointing")


def without_dropout(config: Any) -> None:
    """Set every dropout rate in a model's configuration, and in the configurations inside it, to 0, and its own SpecAugment off; and
    what rescales its weights between training and evaluation (RWKV), which no adapter would follow."""
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0
    for part in [config, *(value for value in vars(config).values() if hasattr(value, "model_type"))]:
        for key, value in list(vars(part).items()):
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
