"""Whole runs of routed adapters: two processes, and problems that are told before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flora_train.adapters.bank import AdapterBank
from flora_train.cli import main
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from tests.conftest import perturb, spec
from tests.e2e.conftest import Launch
from tests.e2e.test_chat import GREEDY, answers, chat
from tests.e2e.test_routed import command

EXPERTS: dict[str, dict[str, Any]] = {
    "mix": {"method": "mixlora", "experts": 3, "rank": 2, "lr": 0.02, "dropout": 0.1, "jitter": 0.1},
    "fmix": {"method": "mixlora", "expert": "flora", "experts": 2, "top_k": 1, "rank": 2, "lr": 0.05},
    "lora": {"method": "lora", "rank": 2, "lr": 0.02},
}
DECIDED: dict[str, dict[str, Any]] = {
    "switch": {"method": "switch", "experts": 3, "rank": 2, "lr": 0.02, "dropout": 0.1, "jitter": 0.1},
    "iswitch": {"method": "switch", "expert": "ia3", "experts": 2, "top_k": 1, "lr": 0.05},
    "gate": {"method": "meteora", "lr": 0.05, "gate_loss": 0.5},
    "trained": {"method": "meteora", "lr": 0.02, "gate_loss": 0.5, "train_members": True},
    "lora": {"method": "lora", "rank": 2, "lr": 0.02},
}
"""Gates choose among the adapters of MEMBERS."""
MEMBERS = (
    spec("lora", "one", rank=3),
    spec("flora", "two", rank=2, variant="residual"),
    spec("ia3", "three"),
)
OWN_LOSSES = ("balance_loss", "gate_loss")


def save_recipe(recipe: Path, folder: Path, adapters: dict[str, dict[str, Any]], **tasks: Any) -> Path:
    """The tiny recipe with these adapters and tasks, in draws of two examples."""
    content = yaml.safe_load(recipe.read_text())
    content |= {"name": "routed", "adapters": adapters}
    content["tasks"] |= tasks
    content["mixture"]["examples_per_draw"] = 2
    content["training"] |= {"tokens_per_step": 300, "tokens_per_microbatch": 80}
    path = folder / "routed.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def routed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters with routers of each block."""
    return save_recipe(recipe, tmp_path_factory.mktemp("routed"), EXPERTS)


@pytest.fixture(scope="module")
def decided(recipe: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters with one router, and gates over exported adapters, which both tasks name."""
    folder = tmp_path_factory.mktemp("decided")
    bank = AdapterBank.attach(AutoModelForCausalLM.from_pretrained(checkpoint), list(MEMBERS))
    perturb(bank)
    base = BaseModel(str(checkpoint))
    over = [str(export_peft(bank, one.name, folder / one.name, base=base)) for one in MEMBERS]
    adapters = dict(DECIDED)
    for name in ("gate", "trained"):
        adapters[name] = {**adapters[name], "over": over}
    tasks = yaml.safe_load(recipe.read_text())["tasks"]
    for name, task in tasks.items():
        rows = [json.loads(line) for line in Path(task["train"]).read_text().splitlines()]
        rows = [{**row, "member": MEMBERS[n % 3].name} for n, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task |= {"train": str(folder / f"{name}.jsonl"), "task_id": "member"}
    return save_recipe(recipe, folder, adapters, **tasks)


def last_record(run: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "step"][-1]["adapters"]


def largest_difference(run: Path, other: Path, adapters: int) -> float:
    files = sorted(path.relative_to(run) for path in run.glob("**/best/*.safetensors"))
    assert len(files) == adapters
    differences = []
    for file in files:
        left, right = load_file(run / file), load_file(other / file)
        differences += [float((left[key].float() - right[key].float()).abs().max()) for key in left]
    return max(differences)


def run_of(recipe: Path, launch: Launch) -> Path:
    """The run of a recipe on one process."""
    run = recipe.parent / "one"
    done = launch(f"recipe={recipe}", f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def routed_run(routed: Path, launch: Launch) -> Path:
    return run_of(routed, launch)


@pytest.fixture(scope="module")
def decided_run(decided: Path, launch: Launch) -> Path:
    return run_of(decided, launch)


@pytest.mark.parametrize("words", [[], ["model.fsdp=true"]], ids=["whole base", "divided base"])
@pytest.mark.parametrize("kind", ["routed", "decided"])
@pytest.mark.quick("routed-whole base", "decided-whole base")
def test_two_processes_equal_one(
    words: list[str], kind: str, request: pytest.FixtureRequest, launch: Launch, tmp_path: Path
) -> None:
    one, two = request.getfixturevalue(f"{kind}_run"), tmp_path / "two"
    recipe: Path = request.getfixturevalue(kind)
    done = launch(f"recipe={recipe}", f"output_dir={two}", *words, processes=2)
    assert done.returncode == 0, done.stderr
    one_record, two_record = last_record(one), last_record(two)
    adapters = yaml.safe_load(recipe.read_text())["adapters"]
    assert largest_difference(one, two, 2 * len(adapters)) <= 1e-6
    for name, metrics in one_record.items():
        assert metrics["loss"] == pytest.approx(two_record[name]["loss"], abs=1e-5)
        method = adapters[name.partition("-")[2]]["method"]
        has = {"lora": (False, False), "meteora": (False, True)}.get(method, (True, False))
        assert tuple(loss in metrics for loss in OWN_LOSSES) == has
        for loss in OWN_LOSSES:
            assert metrics.get(loss) == pytest.approx(two_record[name].get(loss), abs=1e-5)


def test_commands_use_a_switch_and_gates_or_say_why_not(decided_run: Path, tmp_path: Path) -> None:
    """Exported, pushed and talked to as other adapters; vLLM and single weights are refused."""
    names = [f"letters-{family}" for family in ("switch", "gate")]
    done = command("export", str(decided_run), *names, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    for name in names:
        assert (tmp_path / "out" / name / "routing.json").is_file()
        card = (decided_run / "adapters" / name / "README.md").read_text()
        assert "PeftModel.from_pretrained" in card
        pushed = command(
            "push", str(decided_run), name, "--repo", "me/mine", "--dry-run", "--base", "me/base"
        )
        assert pushed.returncode == 0, pushed.stderr
        assert f"{name}/expert_1/adapter_model.safetensors" in pushed.stdout
        folder = str(decided_run / "adapters" / name)
        refusals = {
            ("serve", str(decided_run), name): "is a routed adapter",
            ("serve", folder): "is a routed adapter (routing.json), and vLLM has no router",
            (
                "export",
                str(decided_run),
                name,
                "--as",
                "merged",
            ): "a router chooses the experts of each token",
            ("convert", folder, "--out", str(tmp_path / "x")): f"such as {folder}/expert_0",
        }
        for words, reason in refusals.items():
            refused = command(*words)
            assert refused.returncode == 2
            assert refused.stderr.count("error: ") == 1
            assert reason in refused.stderr
    said = chat(decided_run, *names, "--plain", *GREEDY, said="abcd", cache=tmp_path)
    assert said.returncode == 0, said.stderr
    assert [name for name, _ in answers(said.stdout)] == ["base", *names]


def test_a_draw_that_no_microbatch_holds_is_refused(
    routed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"recipe={routed}",
        f"output_dir={tmp_path}",
        "training.tokens_per_microbatch=20",
        "training.max_length=14",
    ]
    assert main(["train", *words]) != 0
    said = capsys.readouterr().err
    assert "training.tokens_per_microbatch = 20: cannot hold a draw of 2 examples of task 'letters'" in said
    assert "adapters.mix balances the load of its experts: raise it to" in said


def test_plan_and_doctor_know_experts(routed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"recipe={routed}"]) == 0
    said = capsys.readouterr().out
    assert "2 x mix, rank 2, 2 of 3 lora experts" in said
    assert "2 x fmix, rank 2, 1 of 2 flora experts" in said
    assert "2 down_proj 48 x 32 (2 of 3 experts)" in said
    assert "2 q_proj 32 x 32," in said
    assert main(["plan", f"recipe={routed}"]) == 0
    said = capsys.readouterr().out
    assert "2 x mix, rank 2, 2 of 3 lora experts: " in said
