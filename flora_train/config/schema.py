"""The configuration of a run: all sections, and the checks between them."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator, model_validator

from flora_train.config.adapter_schema import AdapterConfig, adapter_name
from flora_train.config.base import MOST_PROCESSES, ConfigModel, Name, PathText
from flora_train.config.consistency import (
    AdapterOutline,
    Contradictions,
    disagreements,
    gates_without_ids,
    heads_without_labels,
    idle_seed,
    mixed_task_types,
    small_draws,
)
from flora_train.config.errors import Problem
from flora_train.config.evaluation_schema import EvaluationConfig
from flora_train.config.federated_checks import federated_problems
from flora_train.config.federated_schema import GLOBAL_TASK, FederatedConfig
from flora_train.config.model_schema import ModelConfig
from flora_train.config.paths import at_home
from flora_train.config.speech_schema import AudioConfig
from flora_train.config.sweep import SweepConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.config.training_schema import (
    GuardConfig,
    KernelsConfig,
    MixtureConfig,
    PagingConfig,
    TrackingConfig,
    TrainingConfig,
)
from flora_train.config.unused_keys import ignored_keys


class RunConfig(ConfigModel):
    name: Name
    """Name of the run."""
    output_dir: PathText | None = None
    """Run folder. Default: outputs/<name>."""
    overwrite: bool = False
    """If output_dir already holds a run: false refuses to start, true deletes the files that the run wrote
    (they are listed in its run.json). A run that another process trains, or whose run.json lists no files, is
    never deleted."""
    resume: bool = False
    """If output_dir already holds this run: continue from its last checkpoint, or keep it if it is
    finished."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of initialization, mixture, dropout and, without tasks.*.split_seed, of the choice of examples."""
    num_processes: int | None = Field(None, ge=1, le=100_000)
    """Number of processes that the launcher must have started, checked when the run starts. Default: any
    number."""
    num_threads: int | None = Field(None, ge=1, le=MOST_PROCESSES)
    """CPU threads of each process. Default: the machine's cores divided by the processes on it (accelerate's
    launcher would set one thread)."""
    model: ModelConfig
    """The frozen base model."""
    tasks: dict[Name, TaskConfig] = Field(min_length=1)
    """The tasks, by name."""
    adapters: dict[Name, AdapterConfig] = Field(min_length=1)
    """The adapters, by name. Each is trained once for each of its tasks."""
    mixture: MixtureConfig = MixtureConfig()
    """How tasks share the steps."""
    training: TrainingConfig
    """Steps, batches, optimizer and checkpoints."""
    audio: AudioConfig = AudioConfig()
    """How the clips of speech tasks are read."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured during training and at its end."""
    sweep: SweepConfig = SweepConfig()
    """What happens to adapters that were made by lists of values."""
    guard: GuardConfig = GuardConfig()
    """What happens after a step with a bad loss or gradient."""
    paging: PagingConfig = PagingConfig()
    """Storage of the adapters that do not fit on the device."""
    kernels: KernelsConfig = KernelsConfig()
    """Which implementation computes the adapters."""
    tracking: TrackingConfig = TrackingConfig()
    """Experiment trackers beside metrics.jsonl."""
    federated: FederatedConfig | None = None
    """Train in rounds of clients whose adapters a server combines. Default: train the tasks as they are."""

    @field_validator("resume")
    @classmethod
    def _resume_or_overwrite(cls, resume: bool, info: ValidationInfo) -> bool:
        if resume and info.data.get("overwrite"):
            raise ValueError("contradicts overwrite=true, which deletes the run: set one of them")
        return resume

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        outlines = {name: AdapterOutline(a.tasks, a.warmup_steps) for name, a in self.adapters.items()}
        split_tasks = [name for name, task in self.tasks.items() if task.is_split]
        problems = disagreements(list(self.tasks), outlines, self.training.steps, split_tasks=split_tasks)
        if not problems and (problem := mixed_task_types(self.tasks)):
            problems = [problem]
        if not problems and (problem := small_draws(self.tasks, self.mixture.examples_per_draw)):
            problems = [problem]
        if not problems and (problem := heads_without_labels(self.tasks, self.adapters)):
            problems = [problem]
        if not problems and (problem := gates_without_ids(self.tasks, self.adapters)):
            problems = [problem]
        if not problems and (problem := idle_seed(self.tasks, self.adapters)):
            problems = [problem]
        problems = problems or ignored_keys(self.tasks) or self._sweep_problems() or self._patience_problems()
        problems = problems or self._federated_problems()
        if problems:
            raise Contradictions(problems)
        return self

    def _sweep_problems(self) -> list[Problem]:
        late = [rung for rung in self.sweep.rungs or () if rung >= self.training.steps]
        if late:
            hint = f"must be smaller than training.steps = {self.training.steps}: rungs precede the last step"
            return [Problem("sweep.rungs", late[0], hint)]
        if self.sweep.strategy == "halving" and not any(adapter.sweep for adapter in self.adapters.values()):
            hint = "requires a sweep: no adapter has a list of values, such as adapters.NAME.lr=[1e-3,2e-3]"
            return [Problem("sweep.strategy", "halving", hint)]
        return []

    def _patience_problems(self) -> list[Problem]:
        for name, adapter in self.adapters.items():
            if adapter.patience is not None and self.evaluation.interval is None:
                hint = f"is required by adapters.{name}.patience: set it to a number of steps"
                return [Problem("evaluation.interval", None, hint)]
        return []

    def _federated_problems(self) -> list[Problem]:
        if self.federated is None:
            return []
        sections = {
            "training": self.training,
            "evaluation": self.evaluation,
            "mixture": self.mixture,
            "sweep": self.sweep,
            "guard": self.guard,
            "paging": self.paging,
            "tracking": self.tracking,
        }
        return federated_problems(self.federated, self.tasks, self.adapters, sections, model=self.model)

    @property
    def compares_states(self) -> bool:
        """Whether states of adapters are compared during training."""
        if self.sweep.strategy == "halving":
            return True
        has_patience = any(adapter.patience is not None for adapter in self.adapters.values())
        return self.evaluation.interval is not None and (self.evaluation.select_best or has_patience)

    @property
    def adapter_names(self) -> list[str]:
        """Names of all adapters, in the order of the bank: every entry of `adapters` with each of its
        tasks; of federated runs, the global adapters."""
        if self.federated is not None:
            return [adapter_name(GLOBAL_TASK, run) for run in self.federated.runs]
        names = []
        for family, adapter in self.adapters.items():
            names += [adapter_name(task, family) for task in adapter.tasks or self.tasks]
        return names

    @property
    def folder(self) -> str:
        """The run folder, relative to the working directory unless the user gave an absolute path."""
        return str(at_home(self.output_dir or f"outputs/{self.name}"))
