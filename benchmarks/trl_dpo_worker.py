"""TRL's side of preferences_vs_trl.py: a DPOTrainer that waits for the number of steps to take.

It runs in TRL's environment. It reads numbers from standard input and answers with the seconds that so many
iterations of the loop took.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main():
    request = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(request["threads"])
    clock = time.process_time if request["threads"] == 1 else time.perf_counter

    class OnCommand(TrainerCallback):
        """Lets the loop run for as many steps as it is told to, and times them."""

        left, started = 0, 0.0

        def on_train_begin(self, args, state, control, **kwargs):
            self.wait()

        def on_step_end(self, args, state, control, **kwargs):
            self.left -= 1
            if not self.left:
                answer(clock() - self.started)
                self.wait()

        def wait(self):
            line = sys.stdin.readline()
            if not line:
                sys.exit()
            self.left, self.started = int(line), clock()

    config = DPOConfig(
        output_dir=request["output"],
        per_device_train_batch_size=request["batch_size"],
        max_steps=10**6,
        beta=request["beta"],
        learning_rate=request["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_torch",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(request["base"], dtype="float32"),
        args=config,
        train_dataset=Dataset.from_list(request["rows"]),
        processing_class=AutoTokenizer.from_pretrained(request["base"]),
        peft_config=LoraConfig(r=request["rank"], target_modules="all-linear", lora_dropout=0.0),
        callbacks=[OnCommand()],
    )
    versions = {name: version(name) for name in ("trl", "transformers", "peft", "torch")}
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    answer(json.dumps({"versions": versions, "parameters": parameters}))
    trainer.train()


def answer(text):
    print(f"answer {text}", flush=True)


main()
