"""What can an evaluation be told? When held-out loss is measured, and which problems are solved and executed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from flora_train.config.base import MOST_PROCESSES, MOST_ROWS, MOST_STEPS, ConfigModel, PathText
from flora_train.config.language_names import ProgrammingLanguages

COLDEST = 0.001
"""The lowest temperature above 0: logits are divided by it."""
Sandbox = Literal["bubblewrap", "none"]
MOST_COMPLETIONS = 10_000
"""Of one problem."""
Ks = Annotated[list[Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)]], Field(min_length=1, max_length=100)]


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EvaluationConfig(ConfigModel):
    interval: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Steps between two evaluations on the held-out rows; null: only at the end."""
    select_best: bool = True
    """Keep, per adapter, the parameters of its best evaluation; else those of its last step."""
    max_examples: int | None = Field(None, ge=1, le=MOST_ROWS)
    """Held-out examples per task at the evaluations during training, which select; the report uses all."""
    bootstrap_samples: int = Field(2000, ge=100, le=100_000)
    """Resamples of the held-out examples, or of the problems, behind every interval."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Level of the intervals."""
    max_new_tokens: int = Field(64, ge=1, le=1_000_000)
    """Longest completion, of tasks.*.sample_prompts and of problems (MultiPL-E's own protocol: 1024)."""
    problems: Annotated[list[PathText], BeforeValidator(_one_or_several)] = []
    """Programming problems that base and adapters solve at the end of the run, in the language of each task: starter (ours,
    easy), a folder of MultiPL-E's humaneval-<language>.jsonl, or hub:nuprl/MultiPL-E. Several may be listed."""
    languages: ProgrammingLanguages | None = Field(None, min_length=1)
    """Evaluate these languages only. Default: those of all tasks that name one."""
    max_problems: int | None = Field(None, ge=1, le=MOST_ROWS)
    """The first so many problems of each language; the report says how many there were."""
    num_samples: int = Field(20, ge=1, le=MOST_COMPLETIONS)
    """Completions per problem and contender."""
    pass_at_k: Ks = Field([1], validate_default=True)
    """pass@k for these k, each at most n."""
    temperature: float = Field(0.2, ge=0, le=100)
    """Of drawing completions; 0 is greedy. MultiPL-E: 0.2 for pass@1, 0.8 for pass@10 and pass@100."""
    top_p: float = Field(0.95, ge=1e-6, le=1)
    """Draw from the likeliest tokens that have this probability together."""
    beams: int = Field(1, ge=1, le=256)
    """Speech: hypotheses that decoding keeps (beam search); 1 is greedy."""
    embedded_clips: int = Field(12, ge=0, le=10_000)
    """Speech: clips that the report holds, to be played; 0 where they must not be passed on."""
    batch_rows: int = Field(32, ge=1, le=65_536)
    """Completions decoded at one time on one device; what is written does not depend on it, but for rounding."""
    sandbox: Sandbox = "bubblewrap"
    """What confines generated programs. none: nothing does, and the report says so; programs can then read your files and, in
    /proc, the environment of your processes."""
    cpu_seconds: float | None = Field(None, ge=0.01, le=86_400)
    """What a program may compute, in seconds; counted in its own time, not on the clock. Default: each language's, in
    eval/languages.yaml (mostly 15)."""
    workers: int | None = Field(None, ge=1, le=MOST_PROCESSES)
    """Programs that run at one time. Default: the machine's cores."""

    @field_validator("pass_at_k")
    @classmethod
    def _no_more_than_n(cls, k: list[int], info: ValidationInfo) -> list[int]:
        n = info.data.get("num_samples")
        if n is not None and max(k) > n:
            raise ValueError(
                f"pass@{max(k)} needs {max(k)} completions a problem and n = {n}: raise evaluation.num_samples, or lower k"
            )
        return k

    @field_validator("temperature")
    @classmethod
    def _greedy_once(cls, temperature: float, info: ValidationInfo) -> float:
        n = info.data.get("num_samples")
        if 0 < temperature < COLDEST:
            raise ValueError(f"must be 0 (greedy), or at least {COLDEST}")
        if temperature == 0 and n is not None and n > 1:
            raise ValueError(f"writes the same completion {n} times: set evaluation.num_samples=1, or a temperature above 0")
        return temperature
