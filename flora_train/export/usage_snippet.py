"""The Python snippet of a model card: it loads the adapter on its base model and generates from one input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from flora_train.config.errors import UserError
from flora_train.config.model_schema import ModelConfig
from flora_train.config.sample_prompts import Messages, SamplePrompt
from flora_train.config.schema import RunConfig
from flora_train.config.speech_schema import SpeechConfig
from flora_train.data.audio.speech_processor import NO_TIMESTAMPS, START, TRANSCRIBE
from flora_train.data.chat.template import ChatTemplate
from flora_train.export.adapter_description import ROUTED
from flora_train.export.label_names import LabelNames
from flora_train.export.label_snippet import label_snippet
from flora_train.export.peft_forms import EMBEDDINGS
from flora_train.export.python_source import python_literal
from flora_train.export.routed_snippet import loading_lines
from flora_train.models.loading import load_model_config, load_tokenizer, tokenizer_in_code
from flora_train.models.speech_encoder import is_whisper


@dataclass(frozen=True)
class GenerationExample:
    """The input of the snippet's `generate()` call."""

    prompt: SamplePrompt = "Once upon a time"
    """Text models: the prompt, or messages."""
    max_new_tokens: int = 64
    decoder_prompt: tuple[str, ...] = ()
    """Speech models: the decoder's first tokens, by name. Empty: the model's start token."""
    tokenizer: tuple[str, str] = ("AutoTokenizer", "")
    """Text models: the class that loads the tokenizer, and its further options."""
    chat_template: str | None = None
    """For messages: the template, where it is not the tokenizer's own."""


def generation_example(config: RunConfig, task: str) -> GenerationExample:
    """The example for a task: its first sample prompt, or its decoder prompt, as in the run's evaluation."""
    task_config = config.tasks[task]
    prompt = next(iter(task_config.sample_prompts), GenerationExample.prompt)
    if task_config.speech is not None:
        decoder_prompt = _decoder_prompt(config, task_config.speech)
        return GenerationExample(prompt, config.evaluation.max_new_tokens, decoder_prompt)
    template = None
    own_template = task_config.chat_template
    if not isinstance(prompt, str) and own_template is not None:
        template = _template(config.model, own_template, f"tasks.{task}")
    return GenerationExample(
        prompt,
        config.evaluation.max_new_tokens,
        tokenizer=_tokenizer(config.model),
        chat_template=template,
    )


@cache
def _tokenizer(model: ModelConfig) -> tuple[str, str]:
    return tokenizer_in_code(model)


@cache
def _template(model: ModelConfig, name: str, key: str) -> str | None:
    """The chat template of a task; None if base or template are no longer available."""
    try:
        return ChatTemplate.of(load_tokenizer(model), name, key).source
    except UserError:
        return None


def _decoder_prompt(config: RunConfig, speech: SpeechConfig) -> tuple[str, ...]:
    if speech.prompt is not None:
        return tuple(speech.prompt)
    try:
        model_is_whisper = is_whisper(load_model_config(config.model))
    except UserError:  # the base model is no longer available
        model_is_whisper = speech.token is not None
    if not model_is_whisper:
        return ()
    return START, speech.token or f"<|{speech.language}|>", TRANSCRIBE, NO_TIMESTAMPS


def usage_snippet(
    adapter_config: Mapping[str, Any],
    example: GenerationExample,
    *,
    source: str,
    subfolder: str | None = None,
    labels: LabelNames | None = None,
) -> str:
    """Python source that runs as it stands, once the adapter is at `source`.

    adapter_config: content of adapter_config.json; source: folder or hub name of the adapter; subfolder: its
    folder there; labels: of an adapter with a head.
    """
    if labels is not None:
        return label_snippet(adapter_config, labels, source=source, subfolder=subfolder)
    base = python_literal(adapter_config["base_model_name_or_path"])
    if (revision := adapter_config.get("revision")) is not None:
        base += f", revision={python_literal(revision)}"
    adapter = python_literal(source)
    if subfolder is not None:
        adapter += f", subfolder={python_literal(subfolder)}"
    if adapter_config["task_type"] == EMBEDDINGS:
        return _embed(adapter_config, source, subfolder)
    if ROUTED in adapter_config:
        method = adapter_config[ROUTED]["method"]
        load = loading_lines(source, subfolder, base, example.tokenizer[0], method=method)
        return "\n".join([*load, *_complete(base, example)])
    imports = ["from peft import PeftModel"]
    if adapter_config["peft_type"] == "FLORA":
        imports.insert(0, "import flora_train.peft_plugin")
    if adapter_config["task_type"] is None:
        auto_class, reader = "AutoModelForSpeechSeq2Seq", "AutoProcessor"
        generate = _transcribe(base, example)
        first_imports = ["import soundfile"]
        if example.decoder_prompt:
            first_imports.append("import torch")
        imports = first_imports + imports
    else:
        auto_class, reader = "AutoModelForCausalLM", example.tokenizer[0]
        generate = _complete(base, example)
    imports.append(f"from transformers import {auto_class}, {reader}")
    load = [
        f"base = {auto_class}.from_pretrained({base})",
        f"model = PeftModel.from_pretrained(base, {adapter}).eval()",
    ]
    return "\n".join([*imports, "", *load, *generate])


def _embed(adapter_config: Mapping[str, Any], source: str, subfolder: str | None) -> str:
    """The snippet of an adapter that learnt embeddings, whose folder sentence-transformers loads."""
    imports = ["from sentence_transformers import SentenceTransformer"]
    folder = python_literal(source)
    if subfolder is not None:
        imports.insert(0, "from huggingface_hub import snapshot_download")
        folder = f"snapshot_download({folder}) + {python_literal('/' + subfolder)}"
    if adapter_config["peft_type"] == "FLORA":
        imports.insert(0, "import flora_train.peft_plugin")
    return "\n".join(
        [
            *imports,
            "",
            f"model = SentenceTransformer({folder})",
            'embeddings = model.encode(["A first text.", "A second text."])',
            "print(model.similarity(embeddings, embeddings))",
        ]
    )


def _complete(base: str, example: GenerationExample) -> list[str]:
    reader, options = example.tokenizer
    load = f"tokenizer = {reader}.from_pretrained({base}{options})"
    if not isinstance(example.prompt, str):
        return [load, *_answer(example.prompt, example)]
    return [
        load,
        "",
        f"prompt = {python_literal(example.prompt)}",
        'inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)',
        f"output = model.generate(**inputs, max_new_tokens={example.max_new_tokens})",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ]


def _answer(messages: Messages, example: GenerationExample) -> list[str]:
    """The snippet's lines that answer messages."""
    template = []
    if example.chat_template is not None:
        template = [f"tokenizer.chat_template = {python_literal(example.chat_template)}"]
    return [
        *template,
        "",
        "messages = [",
        *(f"    {_python_value(message)}," for message in messages),
        "]",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(model.device)",
        f"output = model.generate(**inputs, max_new_tokens={example.max_new_tokens})",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]


def _transcribe(base: str, example: GenerationExample) -> list[str]:
    options = ""
    prompt = []
    if example.decoder_prompt:
        tokens = ", ".join(python_literal(token) for token in example.decoder_prompt)
        prompt = [
            f"prompt = processor.tokenizer.convert_tokens_to_ids([{tokens}])",
            "prompt = torch.tensor([prompt], device=model.device)",
        ]
        options = ", decoder_input_ids=prompt"
    return [
        f"processor = AutoProcessor.from_pretrained({base})",
        "",
        'audio, sampling_rate = soundfile.read("clip.wav")  # mono, 16 kHz, at most 30 s',
        'inputs = processor(audio, sampling_rate=sampling_rate, return_tensors="pt")',
        "inputs = inputs.to(model.device, model.dtype)",
        *prompt,
        f"output = model.generate(**inputs{options}, max_new_tokens={example.max_new_tokens})",
        "print(processor.batch_decode(output, skip_special_tokens=True)[0])",
    ]


def _python_value(value: Any) -> str:
    """A value of a message as Python source."""
    if isinstance(value, str):
        return python_literal(value)
    if isinstance(value, Mapping):
        items = (f"{python_literal(str(key))}: {_python_value(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_python_value, value))}]"
    return repr(value)
