"""Trains adapters with TRL's trainers on given rows, and writes each step's loss and the final weights.

The request has "base" (folder of model and tokenizer) and "jobs": objective, adapter (a PEFT folder, or
null), rows, batch_size, beta, optimizer, learning_rate and further options of the trainer's configuration.
"""

import json
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "ipo": (DPOTrainer, DPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "kto": (KTOTrainer, KTOConfig),
}


def train(job, base, folder, arrays):
    trainer_class, config_class = TRAINERS[job["objective"]]

    class Recording(trainer_class):
        """Keeps the loss of every step."""

        losses = []

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    rows = Dataset.from_list(job["rows"])
    config = config_class(
        output_dir=str(folder / "output"),
        per_device_train_batch_size=job["batch_size"],
        num_train_epochs=1,
        beta=job["beta"],
        optim=job["optimizer"],
        learning_rate=job["learning_rate"],
        adam_epsilon=job["epsilon"],
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        weight_decay=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **job["options"],
    )
    trainer = Recording(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    weights = get_peft_model_state_dict(trainer.model, adapter_name="default")
    for name, tensor in weights.items():
        arrays[f"{job['name']}/{name}"] = tensor.detach().numpy()
    return {"losses": trainer.losses, "tokens": tokens_of(trainer.train_dataset)}


def tokens_of(rows):
    """The token ids that the trainer made of each row."""
    names = (
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "completion_ids",
        "chosen_input_ids",
        "rejected_input_ids",
    )
    return [{name: row[name] for name in names if name in row} for row in rows]


def main():
    request = json.loads(Path(sys.argv[1]).read_text())
    folder, arrays = Path(request["arrays"]).parent, {}
    results = {job["name"]: train(job, request["base"], folder, arrays) for job in request["jobs"]}
    np.savez(request["arrays"], **arrays)
    Path(request["json"]).write_text(json.dumps(results))


main()
