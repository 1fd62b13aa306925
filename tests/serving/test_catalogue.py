"""Adapters of a catalogue are loaded when they are first requested: by plain vLLM with an environment
variable, and by flora-train serve --on-demand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hub_server import ME, serve
from tests.serving.server import SMALL, VLLM, Server, free_port
from tests.serving.tiny import Exported

PROMPT = "the quick brown fox 12 + 34 = "
STRANGE = 'it\'s 100% {"odd"} \\ = ü, $HOME'
LORA = ("--enable-lora", "--max-loras", "4", "--max-cpu-loras", "16", "--max-lora-rank", "8")


@pytest.fixture(scope="module")
def folder(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All adapters, one under a strange name, and one that cannot be served."""
    root = tmp_path_factory.mktemp("catalogue") / "adapters"
    for name, source in exported.folders.items():
        shutil.copytree(source, root / name)
    shutil.copytree(exported.folders[exported.lora], root / STRANGE)
    shutil.copytree(exported.folders[exported.lora], root / "damaged")
    (root / "damaged" / "adapter_model.safetensors").write_bytes(b"damaged")
    (root / "no-adapter").mkdir()
    return root


@pytest.fixture(scope="module")
def plain(exported: Exported, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`vllm serve` with a catalogue, and without the switch that lets clients load adapters."""
    port = free_port()
    words = [*VLLM, str(exported.base), *SMALL, *LORA, "--host", "127.0.0.1", "--port", str(port)]
    server = Server(
        words,
        port,
        tmp_path_factory.mktemp("log") / "log.txt",
        {"FLORA_TRAIN_CATALOGUE": str(folder), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"},
    )
    yield server.wait_until_ready()
    server.stop()


def models(server: Server) -> list[str]:
    return [model["id"] for model in server.get("/v1/models")["data"]]


def test_every_adapter_is_loaded_when_it_is_first_requested(plain: Server, exported: Exported) -> None:
    """More adapters than slots, all at once, of every method."""
    assert "LoRA adapter" not in plain.output
    names = [*exported.folders] * 2
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda name: plain.complete(name, PROMPT), names))
    assert texts == [exported.greedy(name, PROMPT) for name in names]
    assert plain.complete(str(exported.base), PROMPT) == exported.greedy(None, PROMPT)


def test_the_list_of_models_names_what_can_be_requested(plain: Server, exported: Exported) -> None:
    listed = models(plain)
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(exported.base), *exported.folders, STRANGE, "damaged"}


def test_a_strange_name_is_served(plain: Server, exported: Exported) -> None:
    assert plain.complete(STRANGE, PROMPT) == exported.greedy(exported.lora, PROMPT)


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "no-adapter",
        "..",
        ".",
        "../adapters/{lora}",
        "{root}/{lora}",
        "{lora}/",
        "./{lora}",
        "a\0b",
        "",
        " ",
    ],
)
def test_names_are_no_paths(plain: Server, exported: Exported, folder: Path, name: str) -> None:
    name = name.replace("{lora}", exported.lora).replace("{root}", str(folder))
    status, content = plain.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 2})
    if name == "":  # vLLM takes it for the base model
        assert status == 200
        return
    assert status == 404
    assert content["error"]["type"] == "NotFoundError"


def test_a_damaged_adapter_is_refused_with_its_reason_and_the_engine_lives(
    plain: Server, exported: Exported
) -> None:
    for _ in range(2):
        status, content = plain.post("/v1/completions", {"model": "damaged", "prompt": "a"})
        assert status == 400
        assert "`damaged` cannot be loaded: " in content["error"]["message"]
        assert "deserializing header" in content["error"]["message"]
        assert "stack trace" not in content["error"]["message"]
    status, content = plain.post("/v1/chat/completions", {"model": "damaged", "messages": []})
    assert status == 400
    assert plain.complete(exported.lora, PROMPT) == exported.greedy(exported.lora, PROMPT)


def test_an_adapter_that_arrives_later_is_served(plain: Server, exported: Exported, folder: Path) -> None:
    name = next(name for name in exported.folders if name.endswith("-ia3"))
    shutil.copytree(exported.folders[name], folder / "late")
    assert plain.complete("late", PROMPT) == exported.greedy(name, PROMPT)
    (folder / "later").mkdir()
    status, _ = plain.post("/v1/completions", {"model": "later", "prompt": "a"})
    assert status == 404


def test_clients_cannot_load_folders(plain: Server, exported: Exported) -> None:
    content = {"lora_name": "mine", "lora_path": str(exported.folders[exported.lora])}
    assert plain.post("/v1/load_lora_adapter", content)[0] == 404
    assert plain.post("/v1/unload_lora_adapter", {"lora_name": exported.lora})[0] == 404


def test_a_hub_repository_is_a_catalogue_at_one_commit(exported: Exported, tmp_path: Path) -> None:
    """flora-train serve --on-demand --allow-loading: the commit of its start is served, also after another
    one; and clients may load folders."""
    pure = next(name for name in exported.folders if name.endswith("-pure"))
    repository = tmp_path / "repository"
    for name in (pure, exported.lora):
        shutil.copytree(exported.folders[name], repository / name)
    entries = {name: {"rank": 4} for name in (pure, exported.lora)}
    (repository / "flora_train.json").write_text(json.dumps({"adapters": entries}))
    with serve() as hub:
        hub.add_folder(f"{ME}/adapters", repository)
        port = free_port()
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        words = ["-m", "flora_train", "serve", f"{ME}/adapters", "--on-demand", "--allow-loading"]
        words += ["--port", str(port), "--max-model-len", "512", "--max-num-seqs", "8"]
        server = Server(words, port, tmp_path / "log.txt", environment)
        try:
            server.wait_for_output("print(answer.choices[0].text)")
            assert "and 2 that are loaded when they are first requested" in server.output
            shutil.copytree(exported.folders[exported.lora], tmp_path / "changed" / pure)
            hub.add_folder(f"{ME}/adapters", tmp_path / "changed")
            assert server.complete(pure, PROMPT) == exported.greedy(pure, PROMPT)
            assert server.complete("base", PROMPT) == exported.greedy(None, PROMPT)
            assert server.post("/v1/completions", {"model": "other", "prompt": "a"})[0] == 404
            folder = str(exported.folders[exported.lora])
            loaded = {"lora_name": "mine", "lora_path": folder}
            assert server.post("/v1/load_lora_adapter", loaded)[0] == 200
            assert server.complete("mine", PROMPT) == exported.greedy(exported.lora, PROMPT)
        finally:
            server.stop()
