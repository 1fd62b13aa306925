"""The sizes of a base model without the network: from its folder, the hub's cache, or the table of published
models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from flora_train.config.errors import UserError, first_line, user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.config.published_models import PublishedModel, published_model
from flora_train.models.loading import load_feature_extractor, load_model_config
from flora_train.models.model_path import is_local, missing_folder
from flora_train.models.speech_encoder import is_speech_model

CONNECTION_SECONDS = 4.0
"""Time in which the hub has to answer."""

Origin = Literal["folder", "cache", "published", "hub"]


@dataclass(frozen=True)
class ModelSizes:
    """A base model whose configuration, and feature extractor if it is a speech model, are in a folder."""

    config: ModelConfig
    """With the folder as its path."""
    name: str
    """The path or hub name that the user gave."""
    origin: Origin

    @property
    def is_published(self) -> bool:
        """Whether only its sizes are known here: neither weights nor tokenizer."""
        return self.origin in ("published", "hub")


@contextmanager
def model_sizes(config: ModelConfig) -> Iterator[ModelSizes]:
    """The sizes of a base model.

    A folder comes first, then the hub's cache (of the revision that is named), then the table of published
    models, which knows only their main branch. Asks the hub only for a model that is in none of them. Raises
    UserError if it does not answer.
    """
    path = config.path
    if is_local(path) or missing_folder(path):  # a missing folder is an error of whoever loads it
        yield ModelSizes(config, path, "folder")
        return
    if snapshot := cached_snapshot(config):
        yield ModelSizes(_with_path(config, snapshot), path, "cache")
        return
    published = None
    if config.revision in (None, "main"):
        published = published_model(path)
    with TemporaryDirectory(prefix="flora-train-plan-") as folder:
        if published is None:
            _save_from_hub(config, folder)
            yield ModelSizes(_with_path(config, Path(folder)), path, "hub")
            return
        _save_published(published, folder)
        yield ModelSizes(_with_path(config, Path(folder)), published.name, "published")


def cached_snapshot(config: ModelConfig) -> Path | None:
    """The folder of the hub's cache with this model's revision; None if its config.json is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) else None


def _with_path(config: ModelConfig, folder: Path) -> ModelConfig:
    return config.model_copy(update={"path": str(folder), "revision": None})


def _save_published(model: PublishedModel, folder: str) -> None:
    """Write the configuration of a published model, and the feature extractor of a Whisper."""
    from transformers import AutoConfig, WhisperFeatureExtractor

    values: dict[str, Any] = dict(model.config)
    model_type = values.pop("model_type")
    AutoConfig.for_model(model_type, **values).save_pretrained(folder)
    if model_type == "whisper":
        WhisperFeatureExtractor(feature_size=values["num_mel_bins"]).save_pretrained(folder)


def _save_from_hub(config: ModelConfig, folder: str) -> None:
    """Write the configuration of a model that only the hub knows. Raises UserError if it cannot be loaded."""
    try:
        _check_hub(config)
        model_config = load_model_config(config)
        model_config.save_pretrained(folder)
        if is_speech_model(model_config):
            load_feature_extractor(config).save_pretrained(folder)
    except UserError as error:
        (problem,) = error.problems
        hint = "is neither a folder, nor in the hub's cache, nor a published model whose sizes are known here"
        if published_model(config.path) is not None:
            hint = (
                f"has no revision {config.revision!r} in the hub's cache, and the sizes known here are main's"
            )
        reason = problem.hint
        if not reason.startswith("the hub"):
            reason = f"it {reason}"
        raise user_error("model.path", config.path, f"{hint}: {reason}") from error


def _check_hub(config: ModelConfig) -> None:
    """One short request, because the client repeats its own for half a minute. Raises UserError if the hub
    does not answer."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        url = hf_hub_url(config.path, "config.json", revision=config.revision)
        get_session().head(url, timeout=CONNECTION_SECONDS)
    except HFValidationError:
        return
    except Exception as error:  # of the client's transport, which differs between its versions
        reason = f"the hub at {constants.ENDPOINT} cannot be reached ({first_line(error)})"
        raise user_error("model.path", config.path, f"cannot be loaded, because {reason}") from error
