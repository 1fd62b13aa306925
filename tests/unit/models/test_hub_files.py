"""Base models and adapters of a hub on loopback: with its failures, at one commit, and without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTBigCodeConfig

from flora_train.adapters.peft_tensors import read_files
from flora_train.config.errors import UserError
from flora_train.config.model_schema import ModelConfig
from flora_train.models.base_identity import base_folder, base_identity
from flora_train.models.hub_files import MOST_BYTES
from flora_train.models.loading import load_base_model, load_model_config, load_tokenizer
from flora_train.runtime.hub_snapshot import pin_commits, pinned_commits
from tests.e2e.conftest import save_tiny_checkpoint
from tests.hub_server import STRANGER, Fault, Hub, serve
from tests.hub_server.client import go_offline, start_again, use_hub

NAME = "bigcode/starcoder"
CONFIG = ModelConfig(path=NAME, dtype="float32")
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in shards with a tokenizer, weights of another format, and a picture."""
    folder = save_tiny_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPTBigCodeConfig(**sizes, bos_token_id=1, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "pytorch_model.bin").write_bytes(b"an older format")
    (folder / "plot.png").write_bytes(b"a picture")
    (folder / "README.md").write_text("# A model")
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        hub.add_folder(NAME, folder)
        use_hub(monkeypatch, hub, tmp_path / "cache")
        yield hub


def weights(path: str = NAME) -> dict[str, torch.Tensor]:
    return load_base_model(ModelConfig(path=path, dtype="float32"), CPU).state_dict()


def check_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def refusal(config: ModelConfig = CONFIG) -> str:
    with pytest.raises(UserError) as caught:
        load_base_model(config, CPU)
    return str(caught.value)


def sent(hub: Hub) -> set[str]:
    """Files whose content was sent."""
    return {
        path.rpartition("/")[2]
        for method, path in hub.asked
        if method == "GET" and ("/cdn/" in path or "resolve-cache" in path)
    }


def test_the_configuration_and_the_tokenizer_are_read_without_weights(hub: Hub, folder: Path) -> None:
    assert load_model_config(CONFIG).model_type == "gpt_bigcode"
    assert load_tokenizer(CONFIG)("ab")["input_ids"]
    assert not {name for name in sent(hub) if name.endswith((".safetensors", ".bin", ".png", ".md"))}
    assert base_identity(CONFIG) is None
    check_same(weights(), weights(str(folder)))
    assert "pytorch_model.bin" not in sent(hub)
    assert "plot.png" not in sent(hub)
    assert base_identity(CONFIG) == base_identity(ModelConfig(path=str(folder)))


BESIDE = (
    "model.fp16.safetensors",
    "consolidated.safetensors",
    "model-q4.gguf",
    "training_args.bin",
    "adapter_model.safetensors",
    "m.nemo",
    "m.npy",
    "samples.jsonl",
    "original/consolidated.00.pth",
    "original/params.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "fp16/model.safetensors",
)
"""What repositories have beside the files that transformers loads."""


def test_what_transformers_does_not_load_is_not_downloaded(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(NAME, {path: path.encode() for path in BESIDE})
    with (folder / "weights").open("wb") as large:
        large.truncate(MOST_BYTES + 1)
    hub.add_folder("me/large", folder)
    check_same(weights(), weights(str(folder)))
    load_tokenizer(CONFIG)
    downloaded = {file.relative_to(base_folder_of(NAME)).as_posix() for file in files_of(NAME)}
    assert not downloaded & set(BESIDE)
    check_same(weights("me/large"), weights(str(folder)))
    assert "weights" not in {file.name for file in files_of("me/large")}


def base_folder_of(name: str) -> Path:
    folder = base_folder(ModelConfig(path=name))
    assert folder is not None
    return folder


def files_of(name: str) -> list[Path]:
    return [path for path in base_folder_of(name).rglob("*") if path.is_file()]


def without_a_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def with_a_shard_outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    text = index.read_text(encoding="utf-8")
    index.write_text(text.replace("model-00002", "../model-00002"), encoding="utf-8")


def with_a_damaged_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def without_an_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_a_shard, "names model-00002-of-00003.safetensors, which it does not have"),
        (with_a_shard_outside, "names ../model-00002-of-00003.safetensors, which it does not have"),
        (with_a_damaged_index, "its model.safetensors.index.json names no weights: it is damaged"),
        (without_an_index, "has no weights that transformers loads .*, only model-00001-of-"),
    ],
)
def test_a_repository_that_cannot_be_loaded_is_refused_before_its_weights_are_downloaded(
    change: Callable[[Path], None], reason: str, hub: Hub, folder: Path
) -> None:
    change(folder)
    hub.add_folder("me/incomplete", folder)
    line = refusal(ModelConfig(path="me/incomplete"))
    assert re.search(reason, line)
    assert str(folder.parent) not in line
    assert not {name for name in sent(hub) if name.endswith((".safetensors", ".bin"))}


def test_code_of_a_repository_is_run_with_trust_remote_code_only(hub: Hub, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code = "from transformers import GPTBigCodeConfig\n\nclass MineConfig(GPTBigCodeConfig):\n    pass\n"
    (folder / "configuration_mine.py").write_text(code, encoding="utf-8")
    hub.add_folder("me/mine", folder)
    mine = ModelConfig(path="me/mine")
    assert "comes with code of its own: read that, then set model.trust_remote_code=true" in refusal(mine)
    trusted = mine.model_copy(update={"trust_remote_code": True})
    assert type(load_model_config(trusted)).__name__ == "MineConfig"


def test_an_empty_folder_of_the_model_s_name_is_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    line = refusal()
    assert (
        f"is a folder here ({tmp_path / 'here' / NAME}) without config.json, and read before the hub" in line
    )
    assert hub.asked == []


def test_a_repository_without_a_tokenizer_is_refused(hub: Hub, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    hub.add_folder("me/wordless", folder)
    with pytest.raises(UserError, match=r"it has no tokenizer that can be read \(tokenizer\.json, or"):
        load_tokenizer(ModelConfig(path="me/wordless"))


SURVIVED = {
    "429": Fault("429", times=3),
    "503 for every path": Fault("503", times=3, each=True),
    "no answer": Fault("refuse", times=3),
    "dropped in the middle of every shard": Fault("drop", "/cdn/*", each=True),
    "dropped in the middle of every description": Fault("drop", "/api/resolve-cache/*", each=True),
    "another size": Fault("resize", "/cdn/*", times=2),
    "another content": Fault("corrupt", "/cdn/*", times=2),
    "a commit before every shard": Fault("commit", "*/resolve/*.safetensors", each=True),
    "a commit before every description": Fault("commit", "*/resolve/*.json", each=True),
    "redirects": Fault("relative redirect", "*/resolve/*", times=2, each=True),
}


@pytest.mark.parametrize("fault", SURVIVED.values(), ids=SURVIVED)
def test_failures_that_pass_end_in_the_same_model(hub: Hub, folder: Path, fault: Fault) -> None:
    hub.add_faults(Fault(**{**vars(fault), "seen": type(fault.seen)()}))
    model = load_base_model(CONFIG, CPU)
    check_same(model.state_dict(), weights(str(folder)))
    assert model.generation_config.temperature == 0.25  # transformers goes on without a file that fails
    assert hub.injected[fault.kind] >= min(fault.times, 2)


def test_all_files_are_of_the_commit_that_is_recorded(hub: Hub, folder: Path) -> None:
    commit = hub.repos[NAME].head
    hub.add_faults(Fault("commit", "*/resolve/*config.json"))
    load_tokenizer(CONFIG)
    assert hub.repos[NAME].head != commit
    check_same(weights(), weights(str(folder)))
    assert pinned_commits() == {f"models/{NAME}@main": commit}


def test_a_recorded_commit_is_read_although_the_branch_moved(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.repos[NAME].head
    hub.commit(
        NAME, {"config.json": (folder / "config.json").read_bytes().replace(b'"n_head": 4', b'"n_head": 2')}
    )
    assert load_model_config(CONFIG).n_head == 2
    start_again(monkeypatch)
    pin_commits({f"models/{NAME}@main": commit})
    assert load_model_config(CONFIG).n_head == 4
    assert load_model_config(CONFIG.model_copy(update={"revision": commit})).n_head == 4


def test_what_a_run_downloaded_is_loaded_without_a_network(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_tokenizer(CONFIG)
    go_offline(monkeypatch)
    assert load_tokenizer(CONFIG)("ab")["input_ids"]
    line = refusal()
    assert "its file model-00001-of-" in line
    assert "is not in the local cache, and HF_HUB_OFFLINE forbids access to the hub: unset it" in line
    use_hub(monkeypatch, hub, Path(folder.parent / "cache"))
    expected = weights()
    hub.asked.clear()
    go_offline(monkeypatch)
    check_same(weights(), expected)
    assert hub.asked == []
    assert base_identity(CONFIG) == base_identity(ModelConfig(path=str(folder)))


def test_what_transformers_downloaded_is_loaded_without_a_network(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(NAME, allow_patterns=["*.json", "*.safetensors"])
    go_offline(monkeypatch)
    check_same(weights(), weights(str(folder)))


def test_a_download_that_was_interrupted_has_no_identity_and_is_completed(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_faults(Fault("503", "*model-00002*", times=1000))
    assert "the hub still answered 503 after 6 attempts: try again later" in refusal()
    assert base_identity(CONFIG) is None
    hub.faults.clear()
    start_again(monkeypatch)
    check_same(weights(), weights(str(folder)))


def test_a_gated_model_is_refused_with_what_to_do(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.repos[NAME].gated = True
    page = f"{hub.url}/{NAME}"
    use_hub(monkeypatch, hub, tmp_path / "cache", token=None)
    assert refusal() == (
        f"model.path = {NAME!r}: is gated: accept its terms on {page}, then run `hf auth login`"
    )
    use_hub(monkeypatch, hub, tmp_path / "cache", token=STRANGER)
    assert refusal().startswith(f"model.path = {NAME!r}: is gated, and this login has no access: accept its")
    assert capfd.readouterr().err == ""


def test_a_name_or_revision_that_does_not_exist_is_refused(hub: Hub) -> None:
    line = refusal(ModelConfig(path="bigcode/starcodre"))
    assert "the hub has no such model, or this login may not see it: check the name" in line
    assert "has no revision v7: give a branch, tag or commit that" in refusal(
        CONFIG.model_copy(update={"revision": "v7"})
    )
    assert "has no commit 000000000000 (any more): give another revision" in refusal(
        CONFIG.model_copy(update={"revision": "0" * 40})
    )


def test_a_model_of_the_hub_is_named_as_there(hub: Hub) -> None:
    model = load_base_model(CONFIG, CPU)
    assert (model.name_or_path, model.config.name_or_path) == (NAME, NAME)
    assert load_tokenizer(CONFIG).name_or_path == NAME


def test_an_adapter_of_the_hub_is_read_whatever_fails_for_a_while(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    hub.add_folder("me/adapter", tmp_path / "adapter")
    hub.add_faults("all", Fault("drop", "/cdn/*", each=True))
    config, tensors = read_files("me/adapter", "contenders")
    local_config, local = read_files(str(tmp_path / "adapter"), "contenders")
    assert config == local_config
    check_same(tensors, local)
    with pytest.raises(UserError, match="the hub has no such model, or this login may not see it"):
        read_files("me/another", "contenders")
