"""The command line and the environment of vLLM's server for a base model and its adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flora_train.config.errors import user_error
from flora_train.serving import fairness

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts as --max-lora-rank."""
MOST_SLOTS = 8
"""Adapters in one batch, unless --max-loras says otherwise. Every slot takes device memory of the largest
rank."""
MOST_ON_HOST = 256
"""Adapters in host memory, unless --max-cpu-loras says otherwise; further ones are read again when they are
needed."""
GPU_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""vLLM's second model runner would replay CUDA graphs in which fLoRA and IA3 are missing, so that the plugin
refuses them there (manager.py)."""
MOST_CACHE = 16
"""GiB of the cache of keys and values on a CPU, where as much is free."""
RESERVED = {
    "--model": "the run or the adapters name their base; --base MODEL names another one",
    "--enable-lora": "it is always given",
    "--lora-modules": "the adapters are those of RUN; --allow-loading lets clients load others",
    "--uds": "flora-train serve answers on a port: for a socket, call vllm serve",
    "--headless": "flora-train serve answers on a port: for an engine without one, call vllm serve",
    "--grpc": "flora-train serve answers over HTTP: for gRPC, call vllm serve",
}
"""Flags of vLLM that are set here, or that it cannot be started with here -> why."""


@dataclass(frozen=True)
class Flags:
    """Flags for vLLM as the user wrote them."""

    words: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return any(_name(word) == name for word in self.words)

    def value(self, name: str) -> str | None:
        """The (first) value of a flag such as `--dtype`; None if it is not given. The last one counts."""
        value = None
        for number, word in enumerate(self.words):
            if _name(word) == name:
                _, equals, value = word.partition("=")
                if not equals:
                    value = "".join(self.words[number + 1 : number + 2])
        return value

    def check(self) -> None:
        """Raises UserError for a flag that cannot be passed on."""
        for word in self.words:
            name = _name(word)
            if name in ("--host", "--port"):
                raise user_error(name, None, "is an option of flora-train serve: give it before --")
            if name in RESERVED:
                raise user_error(name, None, f"cannot be passed on: {RESERVED[name]}")
        if "FairScheduler" in (self.value("--scheduler-cls") or ""):
            fairness.check_policy(self.value("--scheduling-policy"))
            fairness.load_settings()


def _name(word: str) -> str | None:
    """`--max_loras=4` -> `--max-loras`; None for a word that is no long flag."""
    if not word.startswith("--") or word == "--":
        return None
    return word.partition("=")[0].replace("_", "-")


def split_words(words: Sequence[str]) -> tuple[list[str], Flags]:
    """(names of adapters, flags for vLLM) of the words after RUN: flags begin with the first word that has a
    dash."""
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return list(words[:first]), Flags(tuple(word for word in words[first:] if word != "--"))


@dataclass(frozen=True)
class Base:
    """The base model that is served."""

    path: str
    """Folder, or name on the hub."""
    revision: str | None = None
    """Of the hub: branch, tag or commit."""
    dtype: str | None = None
    """Number format; None leaves it to vLLM."""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Launch:
    """What the server is started with."""

    base: Base
    adapters: Mapping[str, Path]
    """Name -> folder of the adapters that are loaded at once."""
    rank: int
    """The largest rank of an adapter."""
    count: int
    """Number of adapters that can be requested: those of a catalogue as well."""
    host: str
    port: int
    chat_template: Path | None = None
    base_names: tuple[str, ...] = ()
    """The names of the base model in requests; none leaves the name to the flags."""


def command(launch: Launch, flags: Flags, *, on_cpu: bool) -> list[str]:
    """The arguments of vLLM's `serve`. What `flags` set is left to them. Raises UserError for a rank that
    vLLM does not serve."""
    base = launch.base
    words = [base.path, "--host", launch.host, "--port", str(launch.port), "--enable-lora"]
    defaults: dict[str, str | None] = {
        "--revision": base.revision,
        "--tokenizer-revision": base.revision,
        "--dtype": base.dtype,
        "--max-lora-rank": str(served_rank(launch.rank)) if "--max-lora-rank" not in flags else None,
        **_limits(launch.count, flags),
        "--chat-template": None if launch.chat_template is None else str(launch.chat_template),
    }
    for name, value in defaults.items():
        if value is not None and name not in flags:
            words += [name, value]
    if base.trust_remote_code and "--trust-remote-code" not in flags:
        words.append("--trust-remote-code")
    if on_cpu and not {"--enforce-eager", "--no-enforce-eager"} & {_name(word) for word in flags.words}:
        words.append("--enforce-eager")
    if launch.base_names:
        words += ["--served-model-name", *launch.base_names]
    words += flags.words
    if launch.adapters:
        words.append("--lora-modules")
        words += [module(name, folder) for name, folder in launch.adapters.items()]
    return words


def module(name: str, folder: Path) -> str:
    """An adapter as a value of --lora-modules: JSON carries every name."""
    return json.dumps({"name": name, "path": str(folder)})


def served_rank(rank: int) -> int:
    """The smallest --max-lora-rank for adapters of this rank. Raises UserError if there is none."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise user_error("adapter", None, f"has rank {rank}, and vLLM serves ranks up to {RANKS[-1]}")


def _limits(count: int, flags: Flags) -> dict[str, str | None]:
    """--max-loras and --max-cpu-loras for this number of adapters."""
    slots = max(1, min(count, MOST_SLOTS))
    given = flags.value("--max-loras")
    if given is not None and given.isdecimal():
        slots = int(given)
    on_host = max(slots, min(count, MOST_ON_HOST))
    return {"--max-loras": str(slots), "--max-cpu-loras": str(on_host)}


def cpu_environment(free_bytes: int) -> dict[str, str]:
    """Defaults of the variables that vLLM reads on a CPU."""
    gibibytes = max(1, min(MOST_CACHE, free_bytes // (4 * 2**30)))
    # Threads that are bound to cores need all cores of the machine, which a container need not have.
    return {"VLLM_CPU_KVCACHE_SPACE": str(gibibytes), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
