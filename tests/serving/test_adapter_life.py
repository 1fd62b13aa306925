"""An adapter's life in vLLM: refused with a reason or served exactly, whatever happens to its folder."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import HiraConfig

from flora_train.runtime.manifest import BASE_RECORD
from tests.serving.server import SMALL, VLLM, Server, free_port
from tests.serving.tiny import Exported
from tests.unit.serving.adapter_folders import CONFIG, WEIGHTS, change_config, change_tensors
from tests.unit.serving.damages import DAMAGES

PROMPT = "the quick brown fox jumps over 12 + 34 = "
LONG = PROMPT * 6
"""Several blocks of the prefix cache."""
FLORA, OTHER, IA3, LORA = "a-residual", "b-pure", "a-ia3", "a-lora"


def set_nan(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values()))[0, 0] = float("nan")

    change_tensors(folder, change)


def make_wide(folder: Path) -> None:
    change_config(folder, r=40)

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        import torch

        return {
            name: torch.ones((40, t.shape[1]) if "_A" in name else (t.shape[0], 40))
            for name, t in tensors.items()
        }

    change_tensors(folder, change)


def rename_layers(folder: Path) -> None:
    change_tensors(
        folder, lambda tensors: {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()}
    )


def lengthen(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: t.repeat(1, 2) if "_A" in name else t for name, t in tensors.items()}

    change_tensors(folder, change)


def record_other_base(folder: Path) -> None:
    (folder / BASE_RECORD).write_text(json.dumps({"base": {"weights": "0" * 64, "config": ""}}))


DEFECTS: list[tuple[Callable[[Path], None], str]] = [
    *((damage, reason) for damage, reason in DAMAGES if "no such folder" not in reason),
    (set_nan, "not finite"),
    (make_wide, "has rank 40, and the limit is 16: start vLLM with --max-lora-rank 64"),
    (rename_layers, "layers.7.* which the served model lacks"),
    (lengthen, "it belongs to another base model"),
    (record_other_base, "was trained on other weights"),
    (lambda folder: change_config(folder, peft_type="VERA"), "has the PEFT type VERA"),
    (lambda folder: change_config(folder, hira_alpha=3), "unknown key"),
    (lambda folder: change_config(folder, modules_to_save=["lm_head"]), "modules_to_save"),
]


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    """A folder that a test changes."""
    return shutil.copytree(exported.folders[FLORA], tmp_path / "adapter")


def become(folder: Path, other: Path) -> None:
    """Write the content of another adapter into the folder, in place."""
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((other / name).read_bytes())


def request(name: str, number: int, folder: Path, **options: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(folder), **options)


def texts(engine: Any, prompts: list[str], requests: list[Any], tokens: int = 12) -> list[str]:
    from vllm import SamplingParams

    outputs = engine.generate(
        prompts, SamplingParams(temperature=0, max_tokens=tokens), lora_request=requests, use_tqdm=False
    )
    return [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize(("defect", "reason"), DEFECTS)
def test_generate_refuses_a_bad_adapter_and_the_engine_lives(
    engine: Any, exported: Exported, folder: Path, defect: Callable[[Path], None], reason: str
) -> None:
    from vllm.exceptions import VLLMValidationError

    defect(folder)
    good = request(FLORA, 1, exported.folders[FLORA])
    with pytest.raises(VLLMValidationError, match=rf"(?s)adapter = 'bad': .*({reason})"):
        texts(engine, [PROMPT, PROMPT], [good, request("bad", 99, folder)])
    assert engine.llm_engine.get_num_unfinished_requests() == 0
    assert texts(engine, [PROMPT], [good]) == [exported.greedy(FLORA, PROMPT)]


def test_generate_says_that_a_folder_does_not_exist(engine: Any, tmp_path: Path) -> None:
    from vllm.exceptions import LoRAAdapterNotFoundError

    with pytest.raises(LoRAAdapterNotFoundError, match=r"No adapter found for .*nowhere"):
        texts(engine, [PROMPT], [request("bad", 99, tmp_path / "nowhere")])
    assert texts(engine, [PROMPT], [None])


def test_vanished_and_rewritten_folders_reach_no_request_until_a_reload(
    engine: Any, exported: Exported, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    others = [request(name, 20 + i, path) for i, (name, path) in enumerate(exported.folders.items())]
    mine = request("mine", 50, folder)
    first, second = exported.greedy(FLORA, LONG), exported.greedy(OTHER, LONG)
    assert first != second
    assert texts(engine, [LONG], [mine]) == [first]
    become(folder, exported.folders[OTHER])
    assert texts(engine, [LONG], [mine]) == [first]
    texts(engine, [PROMPT] * len(others), others)  # more than the engine holds, so that it loads `mine` again
    assert texts(engine, [LONG], [mine]) == [first]

    loads: list[str] = []
    original = WorkerLoRAManager._load_adapter

    def counted(self: Any, lora_request: Any) -> Any:
        loads.append(lora_request.lora_name)
        return original(self, lora_request)

    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", counted)
    again = request("mine", 50, folder, load_inplace=True)
    assert texts(engine, [LONG, LONG], [again, None]) == [second, exported.greedy(None, LONG)]
    assert len(loads) == 1  # not once a step
    shutil.rmtree(folder)
    texts(engine, [PROMPT] * len(others), others)
    assert texts(engine, [LONG], [mine]) == [second]


def test_running_requests_keep_the_content_with_which_they_began(
    engine: Any, exported: Exported, folder: Path
) -> None:
    from vllm import SamplingParams

    llm = engine.llm_engine
    params = SamplingParams(temperature=0, max_tokens=30)
    results: dict[str, str] = {}

    def step(times: int) -> None:
        for _ in range(times):
            for output in llm.step():
                if output.finished:
                    results[output.request_id] = output.outputs[0].text

    llm.add_request("old", LONG, params, lora_request=request("mine", 60, folder))
    step(5)
    become(folder, exported.folders[IA3])
    assert llm.add_lora(request("mine", 60, folder, load_inplace=True))
    llm.add_request("new", LONG, params, lora_request=request("mine", 60, folder))
    step(3)
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(Exception, match="is not a PEFT adapter"):
        llm.add_lora(request("mine", 60, folder, load_inplace=True))
    llm.add_request("newest", LONG, params, lora_request=request("mine", 60, folder))
    while llm.has_unfinished_requests():
        step(1)
    old, new = (exported.greedy(name, LONG, 30) for name in (FLORA, IA3))
    assert results == {"old": old, "new": new, "newest": new}


def test_adapters_never_share_a_cached_prefix(engine: Any, exported: Exported, tmp_path: Path) -> None:
    """One name and one folder, one content after the other; then all under names of their own."""
    place = tmp_path / "place"
    place.mkdir()
    for number, (name, path) in enumerate(exported.folders.items(), start=100):
        become(place, path)
        expected = exported.greedy(name, LONG)
        for _ in range(2):  # the second time from the cache
            assert texts(engine, [LONG], [request("one", number, place)]) == [expected], name
    names = [None, *exported.folders]
    requests = [name and request(name, 200 + i, exported.folders[name]) for i, name in enumerate(names)]
    expected_texts = [exported.greedy(name, LONG) for name in names]
    for _ in range(2):
        assert texts(engine, [LONG] * len(names), requests) == expected_texts


def test_adapters_are_listed_pinned_and_removed_by_their_own_ids(
    engine: Any, exported: Exported, folder: Path
) -> None:
    llm = engine.llm_engine
    assert llm.add_lora(request("mine", 7001, folder))
    assert 7001 in llm.list_loras()
    assert llm.remove_lora(7001)
    assert 7001 not in llm.list_loras()
    assert not llm.remove_lora(7001)
    become(folder, exported.folders[LORA])
    assert texts(engine, [PROMPT], [request("mine", 7001, folder)]) == [exported.greedy(LORA, PROMPT)]


@pytest.fixture(scope="module")
def server(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM's server, which holds three adapters and computes two at once."""
    place = tmp_path_factory.mktemp("server")
    (place / "resolved").mkdir()
    options = ("--max-loras", "2", "--max-cpu-loras", "3", "--max-lora-rank", "16", "--enable-lora")
    port = free_port()
    words = [*VLLM, str(exported.base), "--served-model-name", "base", "--port", str(port), *SMALL, *options]
    words += ["--lora-modules", *(f"{name}={exported.folders[name]}" for name in (FLORA, LORA))]
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_PLUGINS": "flora_train,lora_filesystem_resolver",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(place / "resolved"),
        "FLORA_TRAIN_SNAPSHOTS": str(place / "snapshots"),
    }
    server = Server(words, port, place / "log", environment).wait_until_ready()
    server.place = place  # type: ignore[attr-defined]
    yield server
    server.stop()
    assert [path.name for path in (place / "snapshots").iterdir()] == ["lock"]


def load(server: Server, name: str, folder: Path, **options: Any) -> tuple[int, str]:
    """(HTTP status, message)."""
    status, content = server.post(
        "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), **options}
    )
    if isinstance(content, dict):
        return status, str(content["error"]["message"])
    return status, str(content)


def unload(server: Server, name: str) -> int:
    return server.post("/v1/unload_lora_adapter", {"lora_name": name})[0]


@pytest.mark.parametrize(("defect", "reason"), DEFECTS)
def test_the_server_refuses_a_bad_adapter_and_lives(
    server: Server, exported: Exported, folder: Path, defect: Callable[[Path], None], reason: str
) -> None:
    import re

    defect(folder)
    status, message = load(server, "bad", folder)
    assert status == 400
    assert re.search(rf"(?s)adapter = 'bad': .*({reason})", message), message
    status, _ = server.post("/v1/completions", {"model": "bad", "prompt": PROMPT, "max_tokens": 1})
    assert status == 404
    assert server.complete(FLORA, PROMPT) == exported.greedy(FLORA, PROMPT)


def test_the_server_answers_404_for_a_folder_that_does_not_exist(server: Server, tmp_path: Path) -> None:
    status, message = load(server, "bad", tmp_path / "nowhere")
    assert status == 404
    assert "No adapter found for" in message


def test_more_adapters_than_the_server_holds_whose_folders_vanish(
    server: Server, exported: Exported, tmp_path: Path
) -> None:
    names = {f"copy-{name}": name for name in exported.folders}
    for copy, name in names.items():
        assert load(server, copy, shutil.copytree(exported.folders[name], tmp_path / copy))[0] == 200
    for copy in names:
        shutil.rmtree(tmp_path / copy)
    for _ in range(2):
        for copy, name in names.items():
            assert server.complete(copy, PROMPT) == exported.greedy(name, PROMPT), name
    listed = {model["id"]: model["root"] for model in server.get("/v1/models")["data"]}
    assert listed["copy-a-ia3"] == str(tmp_path / "copy-a-ia3")
    for copy in names:
        assert unload(server, copy) == 200
    assert not set(names) & {model["id"] for model in server.get("/v1/models")["data"]}


def test_a_reload_in_place_reaches_new_requests_only(
    server: Server, exported: Exported, folder: Path
) -> None:
    assert load(server, "mine", folder)[0] == 200
    assert server.complete("mine", LONG) == exported.greedy(FLORA, LONG)
    assert load(server, "mine", folder)[0] == 400  # without load_inplace
    begun: list[str] = []
    thread = threading.Thread(target=lambda: begun.append(server.complete("mine", LONG, 200)))
    thread.start()
    become(folder, exported.folders[OTHER])
    assert load(server, "mine", folder, load_inplace=True)[0] == 200
    assert server.complete("mine", LONG) == exported.greedy(OTHER, LONG)
    (folder / WEIGHTS).write_bytes(b"")
    status, message = load(server, "mine", folder, load_inplace=True)
    assert (status, "is not a PEFT adapter" in message) == (400, True)
    assert server.complete("mine", LONG) == exported.greedy(OTHER, LONG)
    thread.join()
    assert begun[0] in (exported.greedy(FLORA, LONG, 200), exported.greedy(OTHER, LONG, 200))
    assert unload(server, "mine") == 200
    become(folder, exported.folders[IA3])
    assert load(server, "mine", folder)[0] == 200
    assert server.complete("mine", LONG) == exported.greedy(IA3, LONG)
    assert unload(server, "mine") == 200


def test_a_resolver_s_bad_adapter_is_refused_with_its_reason(server: Server, exported: Exported) -> None:
    place: Path = server.place  # type: ignore[attr-defined]
    good = shutil.copytree(exported.folders[LORA], place / "resolved" / "good")
    bad = shutil.copytree(exported.folders[LORA], place / "resolved" / "bad")
    change_config(good, base_model_name_or_path=str(exported.base))
    set_nan(bad)
    assert server.complete("good", PROMPT) == exported.greedy(LORA, PROMPT)
    status, content = server.post("/v1/completions", {"model": "bad", "prompt": PROMPT, "max_tokens": 1})
    assert status == 400
    assert "not finite" in content["error"]["message"]


def test_a_server_does_not_start_with_a_bad_adapter_and_says_why(
    exported: Exported, folder: Path, tmp_path: Path
) -> None:
    set_nan(folder)
    port = free_port()
    words = [*VLLM, str(exported.base), "--port", str(port), *SMALL, "--enable-lora"]
    server = Server([*words, "--lora-modules", f"bad={folder}"], port, tmp_path / "log")
    assert server.process.wait(240) != 0
    assert "adapter = 'bad': is damaged" in server.output


def test_adapters_on_other_kinds_of_layers_are_refused(
    engine: Any, tmp_path: Path, exported: Exported
) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    for number, target in enumerate(("embed_tokens", "lm_head"), start=300):
        model = AutoModelForCausalLM.from_pretrained(exported.base)
        get_peft_model(model, HiraConfig(r=2, target_modules=[target])).save_pretrained(tmp_path / target)
        with pytest.raises(Exception, match=r"adapts an embedding or the output layer"):
            texts(engine, [PROMPT], [request(target, number, tmp_path / target)])
    assert texts(engine, [PROMPT], [None]) == [exported.greedy(None, PROMPT)]
