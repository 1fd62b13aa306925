"""A sweep of twelve settings: one run beside twelve PEFT runs one after the other, on the same examples.

    python benchmarks/sweep.py --save        benchmarks/results/sweep_cpu.md

fLoRA (PEFT: HiRA, its residual form), LoRA and IA3 at four learning rates each, on the quickstart's Lua task.
One segment is a step of the joint run, then one step of every PEFT run on the same rows, learning rates and
clipping; both alternate. PEFT's adapters start with the same initial values, so that both are the same
experiment. At the end both are evaluated on the same held-out examples after their last step, and their
winners are compared. Loading the model, once for flora_train and twelve times for PEFT, is not in the times.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import flora_train.cli  # noqa: F401  (how torch's threads wait is read when torch loads)

# isort: split
import torch
from contenders.peft_run import PeftRun, as_batch, batches_of

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.load import load_config
from flora_train.config.schema import RunConfig
from flora_train.data.batch import group_by_length
from flora_train.run_context import RunContext, load_context
from flora_train.runtime.environment import available_cpus, environment
from flora_train.runtime.progress import ProgressBar
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.heldout import evaluate_heldout
from flora_train.training.optimizer import learning_rate
from flora_train.training.step_plan import heldout_rows, plan_step
from flora_train.training.trainer import Trainer

RESULT = Path(__file__).resolve().parent / "results" / "sweep_cpu.md"
TASK = "lua"
RATES = {
    "flora": "[5e-3,1e-2,2e-2,4e-2]",
    "lora": "[5e-4,1e-3,2e-3,4e-3]",
    "ia3": "[5e-3,1e-2,2e-2,4e-2]",
}


def configuration(steps: int) -> RunConfig:
    """recipe quickstart with a list for every learning rate."""
    lists = [
        f"adapters.{method}.{key}"
        for method, rates in RATES.items()
        for key in (f"lr={rates}", f"tasks=[{TASK}]")
    ]
    sizes = [f"training.steps={steps}", "training.tokens_per_step=3072", "training.max_length=128"]
    files = [f"tasks.{TASK}.{part}=assets/code/{TASK}.{part}.jsonl" for part in ("train", "validation")]
    others = [
        "model.dtype=float32",
        "evaluation.problems=[]",
        "data_config=null",
        "task_defaults.truncation=truncate",
    ]
    return load_config(["recipe=quickstart", *lists, *sizes, *files, *others])


class Sweep:
    """flora_train's trainer with twelve adapters, and twelve PEFT runs, step by step."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.session: RunContext = load_context(config, RunFolder(folder), torch.device("cpu"))
        session = self.session
        self.trainer = Trainer(session)
        session.model.train()
        self.specs: Sequence[AdapterSpec] = session.bank.specs
        self.runs = [PeftRun(config, spec) for spec in self.specs]
        for run, spec in zip(self.runs, self.specs, strict=True):
            run.begin_as(session.bank, spec.name)

    def segment(self, number: int) -> dict[str, float]:
        """One step of all, in an order that changes; seconds of each side."""
        trainer = self.trainer
        plan = plan_step(
            trainer.mixture,
            number,
            trainer.tasks,
            trainer.bank,
            trainer.config.training.tokens_per_microbatch,
        )
        assert plan is not None
        assert set(plan.label_tokens) == set(range(len(self.specs)))
        parts = [
            batches_of(plan, adapter, trainer.training_split, self.session.collate, self.session.pad_token)
            for adapter in range(len(self.specs))
        ]
        seconds = {}
        for who in ("joint", "peft") if number % 2 else ("peft", "joint"):
            started = time.perf_counter()
            if who == "joint":
                trainer.step(number, plan)
            else:
                for run, spec, batches in zip(self.runs, self.specs, parts, strict=True):
                    run.step(batches, learning_rate(spec, number))
            seconds[who] = time.perf_counter() - started
        return seconds

    def losses(self) -> dict[str, dict[str, float]]:
        """Side -> adapter -> held-out nats per token."""
        trainer, validation = self.trainer, self.trainer.tasks[TASK].validation
        room = trainer.config.training.tokens_per_microbatch
        held = evaluate_heldout(
            trainer.row_losses,
            trainer.bank,
            trainer.tasks.values(),
            max_tokens=room,
            pad_token=self.session.pad_token,
        )[TASK]
        rows = heldout_rows(trainer.bank, [0], TASK, validation, None)
        batches = [
            as_batch(self.session.collate(group, lambda task: validation, self.session.pad_token))
            for group in group_by_length(rows, room)
        ]
        return {
            "joint": {spec.name: held.loss(adapter) for adapter, spec in enumerate(self.specs)},
            "peft": {
                spec.name: run.heldout(batches) for spec, run in zip(self.specs, self.runs, strict=True)
            },
        }


def winners(losses: Mapping[str, float], specs: Sequence[AdapterSpec]) -> dict[str, str]:
    """Method -> the adapter with the lowest loss, and `all` methods -> the lowest of all."""
    groups = {method: [spec.name for spec in specs if spec.method == method] for method in RATES}
    return {
        what: min(names, key=lambda name: losses[name])
        for what, names in {**groups, "all": list(losses)}.items()
    }


def report(steps: int) -> str:
    """The result, as Markdown."""
    torch.set_num_threads(available_cpus())
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(configuration(steps), Path(folder))
        segments = []
        with ProgressBar("sweep", steps) as watch:
            for number in range(steps):
                segments.append(sweep.segment(number))
                watch.update(number + 1)
        losses = sweep.losses()
        specs, examples = sweep.specs, len(sweep.trainer.tasks[TASK].validation)
    ratios = [segment["peft"] / segment["joint"] for segment in segments]
    totals = {who: sum(segment[who] for segment in segments) for who in ("joint", "peft")}
    best = {who: winners(losses[who], specs) for who in losses}
    facts = environment()
    versions = ", ".join(f"{name} {facts.packages[name]}" for name in ("torch", "transformers", "peft"))
    rows = [
        f"| {spec.method} | {spec.lr:g} | {losses['joint'][spec.name]:.4f} | "
        f"{losses['peft'][spec.name]:.4f} | "
        f"{', '.join(who for who in best if spec.name in best[who].values()) or '-'} |"
        for spec in specs
    ]
    same = [method for method in RATES if best["joint"][method] == best["peft"][method]]
    return "\n".join(
        [
            "# A sweep of twelve settings: one run, and twelve PEFT runs one after the other",
            "",
            f"{facts.machine.processor}, {available_cpus()} threads, float32, {versions}, commit "
            f"{facts.commit}; SmolLM2-135M, Lua, "
            f"{steps} steps. `python benchmarks/sweep.py --steps {steps} --save` prints this file.",
            "",
            f"All steps: {totals['joint']:.0f} s in one run, {totals['peft']:.0f} s in twelve; PEFT / one "
            "run, a segment: median "
            f"**{median(ratios):.2f}** [{min(ratios):.2f}, {max(ratios):.2f}].",
            "",
            f"Held-out loss after the last step, nats a token, on {examples} examples:",
            "",
            "| method | learning rate | one run | PEFT alone | lowest of its method in |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"The same learning rate wins in {len(same)} of {len(RATES)} methods "
            f"({', '.join(same) or 'none'}); the winner of all twelve: {best['joint']['all']} in one run, "
            f"{best['peft']['all']} in PEFT.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    text = report(options.steps)
    print(text)
    if options.save:
        RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
