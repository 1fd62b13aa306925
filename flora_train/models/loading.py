"""Loading of the frozen base model, its tokenizer and its feature extractor, and models of its shape without
its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from flora_train.config.errors import UserError, first_line, user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.config.paths import find_file
from flora_train.config.schema import RunConfig
from flora_train.data.text_encoder import start_tokens
from flora_train.models.encoders import (
    encoder_class,
    head_names,
    is_encoder,
    record_new_parameters,
)
from flora_train.models.hub_files import download_model
from flora_train.models.model_path import missing_folder
from flora_train.models.published_tokenizer import add_declared_start, settings_in, splits_otherwise
from flora_train.models.speech_encoder import allow_short_windows, is_speech_model, is_whisper
from flora_train.runtime.hub_snapshot import HubError

ENGLISH_VOCABULARY = 51_864
"""Of every English-only Whisper; multilingual ones have one token more, or two."""
LAYER_COUNTS = {
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
}
"""Keys of a configuration that hold a number of layers."""


def load_tokenizer(config: ModelConfig) -> Any:
    """The base model's tokenizer, as its repository publishes it.

    Raises UserError if it cannot be loaded from the folder or hub name.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = _from_pretrained(AutoTokenizer, config)
    folder = Path(_location(config, weights=False))
    if splits_otherwise(tokenizer, folder / "tokenizer.json"):
        tokenizer = _from_pretrained(PreTrainedTokenizerFast, config)
    add_declared_start(tokenizer, folder / "tokenizer_config.json")
    return tokenizer


def load_auto_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer that other programs load, with AutoTokenizer alone. Raises UserError if it cannot be
    loaded.
    """
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, config)


def tokenizer_in_code(config: ModelConfig) -> tuple[str, str]:
    """The class of transformers with which a program loads the same tokenizer, and its further options.

    AutoTokenizer, unless it would read texts otherwise than `load_tokenizer`'s. Nothing is downloaded: where
    the base model is not on this machine, the answer is AutoTokenizer, too.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoTokenizer

    try:
        if not find_file(config.path).exists():
            file = try_to_load_from_cache(config.path, "tokenizer.json", revision=config.revision)
            if not isinstance(file, str):
                return "AutoTokenizer", ""
            config = config.model_copy(update={"path": str(Path(file).parent)})
        automatic, ours = _from_pretrained(AutoTokenizer, config), load_tokenizer(config)
    except (UserError, ValueError):  # damaged, or not a name on the hub
        return "AutoTokenizer", ""
    options = ""
    if start_tokens(automatic) != start_tokens(ours):
        options = ", add_bos_token=True"
    if type(automatic) is type(ours):
        return "AutoTokenizer", options
    return "PreTrainedTokenizerFast", options


def is_english_only(config: ModelConfig, model_config: Any) -> bool:
    """Whether the base is a Whisper of English alone (`.en`), by its published files."""
    vocabulary = getattr(model_config, "vocab_size", 0)
    if not is_whisper(model_config) or vocabulary > ENGLISH_VOCABULARY:
        return False
    settings = settings_in(Path(_location(config, weights=False)) / "generation_config.json")
    return vocabulary == ENGLISH_VOCABULARY or settings.get("is_multilingual") is False


def load_feature_extractor(config: ModelConfig) -> Any:
    """The feature extractor of a speech model."""
    from transformers import AutoFeatureExtractor

    return _from_pretrained(AutoFeatureExtractor, config)


def load_preprocessors(config: ModelConfig, tokenizer: Any) -> list[Any]:
    """The objects that are saved beside a model, so that transformers can use it without the base model.

    They are its tokenizer and, of a speech model, its processor and feature extractor.
    """
    from transformers import AutoProcessor

    if not is_speech_model(load_model_config(config)):
        return [tokenizer]
    return [_from_pretrained(AutoProcessor, config), tokenizer, load_feature_extractor(config)]


def check_model_type(model_config: Any, config: RunConfig) -> None:
    """Raises UserError where the tasks are speech and the model reads text, or the other way round."""
    path, model_type = config.model.path, model_config.model_type
    if is_encoder(model_config):
        _check_encoder_tasks(config, model_type)
        return
    _check_pooling(config, model_type)
    if not any(task.speech is not None for task in config.tasks.values()):
        if is_speech_model(model_config):
            raise user_error(
                "model.path", path, "is a speech model: its tasks need tasks.NAME.speech (docs/speech.md)"
            )
        return
    if not is_speech_model(model_config):
        hint = (
            f"is a {model_type} model, and the tasks are speech: use a speech encoder-decoder such as Whisper"
        )
        raise user_error("model.path", path, hint)
    if config.audio.spec_augment and not is_whisper(model_config):
        hint = f"is for Whisper's features, and the model is a {model_type}: leave it off"
        raise user_error("audio.spec_augment", True, hint)
    if config.model.fsdp:
        hint = "is for text models: a speech model must be whole on every process"
        raise user_error("model.fsdp", True, hint)


def _check_encoder_tasks(config: RunConfig, model_type: str) -> None:
    """Raises UserError where a task is not one that an encoder can learn."""
    for name, task in config.tasks.items():
        if not (task.has_head or task.embeds):
            hint = (
                f"is a {model_type} model, which reads in both directions and predicts no next token, and "
                f"tasks.{name} is to be learnt token by token: give it label (or token_labels), or anchor "
                "and positive, or choose a causal model (a model of BERT's kind is one with is_decoder=true "
                "in its config.json)"
            )
            raise user_error("model.path", config.model.path, hint)
    if config.model.fsdp:
        raise user_error("model.fsdp", True, "an encoder must be whole on every process: leave it off")


def _check_pooling(config: RunConfig, model_type: str) -> None:
    """Raises UserError where embeddings are those of a token that has read nothing."""
    for name, task in config.tasks.items():
        if task.pooling == "cls":
            hint = (
                f"is the first token, which in a {model_type} model has read no other one: use mean or last, "
                "or an encoder"
            )
            raise user_error(f"tasks.{name}.pooling", "cls", hint)


def load_model_config(config: ModelConfig) -> Any:
    """The base model's configuration, as published."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, config)


def load_base_model(config: ModelConfig, device: torch.device) -> nn.Module:
    """The base model on `device`, frozen, without its own dropout.

    Each adapter has its own regularisation, and a mask drawn for the whole batch would make the training of
    an adapter depend on the other adapters. Raises UserError if the model cannot be loaded or its files are
    incomplete.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    model_config = load_model_config(config)
    disable_dropout(model_config)
    options: dict[str, Any] = {"config": model_config, "dtype": resolve_dtype(config.dtype, device)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization != "none":
        options |= {
            "quantization_config": _quantization_config(config, options["dtype"]),
            "device_map": {"": device},
        }
    options["output_loading_info"] = True
    with _without_load_report(is_encoder(model_config)):
        model, loaded = _from_pretrained(_auto_class(model_config), config, weights=True, **options)
    # transformers only warns, and initialises missing weights at random.
    parameters = {name for name, _ in model.named_parameters()}
    absent = loaded["missing_keys"] & parameters
    in_head = frozenset(name for name in absent if name.rpartition(".")[0] in head_names(model))
    if missing := sorted(absent - in_head):
        names = missing[0]
        if len(missing) > 1:
            names += f", and {len(missing) - 1} more"
        hint = f"has no weights for {names}: its files do not belong together, or one is missing"
        raise user_error("model.path", config.path, hint)
    if is_encoder(model_config):
        record_new_parameters(model, in_head)
    if config.quantization == "none":
        model = model.to(device)
    return _prepare(model, config, model_config)


@contextmanager
def _without_load_report(is_expected: bool) -> Iterator[None]:
    """A context in which transformers does not list the weights that a checkpoint lacks, where it lacks those
    of a head: every adapter brings its own."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    if is_expected:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _prepare(model: Any, config: ModelConfig, model_config: Any) -> nn.Module:
    """Freeze the model and apply the run's settings."""
    if config.gradient_checkpointing != "off":
        reentrant = config.gradient_checkpointing == "reentrant"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if is_whisper(model_config):
        allow_short_windows(model)
    return model.requires_grad_(False)


def check_quantization(config: ModelConfig, device: torch.device) -> None:
    """Raises UserError where model.quantization is not supported."""
    if config.quantization == "none":
        return
    if device.type != "cuda":
        advice = "leave it at none (model.dtype=bfloat16 halves the base)"
        hint = f"needs a CUDA GPU, and this run is on {device.type}: {advice}"
        raise user_error("model.quantization", config.quantization, hint)
    if find_spec("bitsandbytes") is None:
        raise user_error(
            "model.quantization",
            config.quantization,
            "needs bitsandbytes: pip install 'flora-train[quantised]'",
        )


def _quantization_config(config: ModelConfig, dtype: torch.dtype) -> Any:
    """model.quantization as transformers expects it."""
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of the base for `model.dtype`; auto: bfloat16 where the device multiplies it faster than
    float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if multiplies_bfloat16_fast(device):
        return torch.bfloat16
    return torch.float32


def multiplies_bfloat16_fast(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 faster than float32: Ampere and later, AMX, and AVX512-BF16 of
    AMD.

    Nothing else about the machine affects `model.dtype=auto`; tests replace this function.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Without AMX, Intel's processors multiply bfloat16 slower than float32.
        fast_avx512 = torch.cpu._is_avx512_bf16_supported() and not _is_intel()
        return torch.cpu._is_amx_tile_supported() or fast_avx512
    return False


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _from_pretrained(auto_class: Any, source: ModelConfig, *, weights: bool = False, **options: Any) -> Any:
    """What an auto class of transformers loads. weights: download the weights, too."""
    location = _location(source, weights=weights)
    try:
        loaded = auto_class.from_pretrained(
            location,
            trust_remote_code=source.trust_remote_code,
            **options,
        )
    except (
        Exception
    ) as error:  # transformers and the readers below it raise their own types for a damaged file
        # the folder in the hub's cache says nothing to a user
        hint = f"cannot be loaded: {_reason(error).replace(location, source.path)}"
        raise user_error("model.path", source.path, hint) from error
    if not find_file(source.path).exists():
        _set_name(loaded, source.path)
    return loaded


def _set_name(loaded: Any, name: str) -> None:
    """Name what was loaded from the hub's cache as the hub does; what is saved says where it came from."""
    parts = loaded if isinstance(loaded, tuple) else (loaded,)
    for part in (*parts, *(getattr(part, "config", None) for part in parts)):
        if hasattr(part, "name_or_path"):
            part.name_or_path = name


def _location(source: ModelConfig, *, weights: bool) -> str:
    """The folder of the base model: a local one, or the downloaded files of a commit on the hub.

    transformers would treat a file that the hub fails to send as a file that the model does not have.
    """
    local = find_file(source.path)
    if local.exists():
        if local.is_dir() and source.path.count("/") == 1 and not (local / "config.json").exists():
            hint = f"is a folder here ({local.absolute()}) without config.json, and read before the hub: "
            raise user_error("model.path", source.path, hint + "rename it, or complete it")
        return str(local)
    missing = missing_folder(source.path)
    if missing is not None:
        raise UserError(missing)
    try:
        return str(download_model(source.path, source.revision, weights=weights))
    except HubError as error:
        raise user_error("model.path", source.path, str(error)) from error


def empty_model(config: ModelConfig) -> nn.Module:
    """The base model's modules without weights (on the meta device)."""
    published = load_model_config(config)
    with torch.device("meta"):
        return build_model(published, config)


def build_model(published: Any, config: ModelConfig, **options: Any) -> nn.Module:
    """A model of this configuration with random weights. Raises UserError if it cannot be built."""
    try:
        model: nn.Module = _auto_class(published).from_config(
            published, trust_remote_code=config.trust_remote_code, **options
        )
    except Exception as error:
        raise user_error("model.path", config.path, f"cannot be loaded: {_reason(error)}") from error
    return model


def _reason(error: Exception) -> str:
    """What is wrong with a model's files, in one line."""
    if "ignore_mismatched_sizes" in str(error):
        return "the shapes of its weights do not match its config.json"
    if "trust_remote_code" in str(error) and "custom code" in str(error):
        return "it comes with code of its own: read that, then set model.trust_remote_code=true to run it"
    if "backend tokenizer" in str(error):
        return "it has no tokenizer that can be read (tokenizer.json, or tokenizer.model with sentencepiece)"
    if isinstance(error, (OSError, ValueError, ImportError, SafetensorError)):
        return first_line(error)
    return f"one of its files is damaged ({type(error).__name__}: {first_line(error)})"


def shallow_model(
    config: ModelConfig, layers: int, device: torch.device, *, decoder_layers: int | None = None
) -> nn.Module:
    """A model of this shape with `layers` layers and random weights, to measure the cost of a layer.

    decoder_layers: of an encoder-decoder. Default: as many as its encoder has.
    """
    published = _shallow_config(config, layers)
    if decoder_layers is not None:
        published.decoder_layers = decoder_layers
    options: dict[str, Any] = {"dtype": resolve_dtype(config.dtype, device)}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    model = build_model(published, config, **options)
    return _prepare(model.to(device), config, published)


def _shallow_config(config: ModelConfig, layers: int) -> Any:
    """The published configuration with `layers` layers."""
    published = load_model_config(config)
    disable_dropout(published)
    text = published.get_text_config(decoder=True)
    for part in unique_parts(published, text):
        for key in LAYER_COUNTS & vars(part).keys():
            setattr(part, key, layers)
        for key in ("layer_types", "attention_layers"):
            value = vars(part).get(key)
            if isinstance(value, list):
                setattr(part, key, value[:layers])
    return published


def zero_model(config: ModelConfig, layers: int | None = None) -> nn.Module:
    """A model of this shape (or with `layers` layers) on the CPU, whose weights are all 0.

    It shows which layers run, and up to which length. The system allocates its memory only when it is written
    to.
    """
    published = load_model_config(config) if layers is None else _shallow_config(config, layers)
    disable_dropout(published)
    with torch.device("meta"):
        empty = build_model(published, config, dtype=torch.float32)
    return _prepare(empty._apply(lambda tensor: torch.zeros_like(tensor, device="cpu")), config, published)


def count_layers(config: ModelConfig) -> tuple[int, int | None]:
    """Layers of the published model, or of its encoder and its decoder (None: it has none of its own).

    Raises UserError for a damaged configuration.
    """
    published = load_model_config(config)
    encoder, decoder = getattr(published, "encoder_layers", None), getattr(published, "decoder_layers", None)
    if isinstance(encoder, int) and isinstance(decoder, int) and min(encoder, decoder) > 0:
        return encoder, decoder
    count = getattr(published.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        hint = f"has {count!r} layers according to its config.json: the file is damaged"
        raise user_error("model.path", config.path, hint)
    return count, None


def _auto_class(model_config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq

    if is_speech_model(model_config):
        return AutoModelForSpeechSeq2Seq
    if is_encoder(model_config):
        return encoder_class(model_config)
    return AutoModelForCausalLM


def set_mode(model: nn.Module, training: bool) -> None:
    """Set training or evaluation mode of a frozen base.

    Only modules that checkpoint activations get training mode, because checkpointing depends on it. For other
    modules it would enable random numbers (dropout, noise of routers) and batch norms, which make rows depend
    on each other.
    """
    model.train(training)
    if training:
        for module in model.modules():
            module.training = module is model or hasattr(module, "gradient_checkpointing")


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """A context in which no activations are checkpointed, for a forward without a backward."""
    if not (model.training and recomputes(model)):
        yield
        return
    set_mode(model, training=False)
    try:
        yield
    finally:
        set_mode(model, training=True)


def recomputes(model: nn.Module) -> bool:
    """Whether activations are checkpointed. transformers 5.20 renamed the property; the old name warns."""
    name = "is_gradient_checkpointing"
    if hasattr(type(model), "is_activation_checkpointing"):
        name = "is_activation_checkpointing"
    return model.training and getattr(model, name, False)


def disable_dropout(config: Any) -> None:
    """Set every dropout rate in a model's configuration and its parts to 0.

    Also disables the model's SpecAugment, and the rescaling of weights between training and evaluation
    (RWKV), which adapters would not follow.
    """
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0
    for part in config_parts(config):
        for key, value in list(vars(part).items()):
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)


def unique_parts(config: Any, other: Any) -> list[Any]:
    """Both configurations, or one if they are the same object."""
    return [config] if config is other else [config, other]


def config_parts(config: Any) -> list[Any]:
    """A model's configuration, and the configurations inside it."""
    return [config, *(value for value in vars(config).values() if hasattr(value, "model_type"))]
