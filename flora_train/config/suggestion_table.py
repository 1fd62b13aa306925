"""Options of other trainers and former names of our own, with the keys that they stand for."""

from __future__ import annotations

from typing import NamedTuple

ADAPTER, TASK = "adapters.NAME", "tasks.NAME"


class Suggestion(NamedTuple):
    """key: the dotted key that is meant; NAME stands for the name of an adapter or task. hint: what to write,
    one sentence."""

    key: str
    hint: str = ""


EPOCHS = "There are no epochs: a run has a number of optimizer steps."
TOKENS = "The size of a step is given in tokens of all adapters and processes, not in rows."
ACCUMULATION = "Micro-batches are accumulated until a step has training.tokens_per_step tokens."
LR = "Every adapter has its own learning rate."
RATIO = (
    "Write a share of the adapter's steps, such as 0.03; adapters.NAME.warmup_steps is the number of steps."
)
SCHEDULE = "Write constant, linear or cosine."
STEPS_BETWEEN = "Write the number of steps between two of them."
BFLOAT16 = "Write bfloat16, float32 or auto."
ALPHA = "The update is scaled by alpha / rank, as in PEFT."
PROMPT = "Write a column, or a template such as '{question}'."
TRACKERS = "Write a list such as [wandb] or [tensorboard]."
METRICS = "Write a list such as [rouge_l, chrf], or a function of your own as module:function."
FIGURE = "Write a figure of labels or embeddings, such as macro_f1 or mrr."
OVERWRITE = "Write true (formerly replace) or false (formerly refuse)."

SUGGESTIONS: dict[str, tuple[Suggestion, ...]] = {
    # adapters
    **dict.fromkeys(
        ("r", "lora_r", "lora_rank", "lora_dim", "adapter_rank"), (Suggestion(f"{ADAPTER}.rank"),)
    ),
    **dict.fromkeys(("lora_alpha", "alpha_lora", "adapter_alpha"), (Suggestion(f"{ADAPTER}.alpha", ALPHA),)),
    **dict.fromkeys(("lora_dropout", "adapter_dropout"), (Suggestion(f"{ADAPTER}.dropout"),)),
    **dict.fromkeys(
        ("use_rslora", "rs_lora", "use_rs_lora"), (Suggestion(f"{ADAPTER}.rslora", "Write true or false."),)
    ),
    **dict.fromkeys(
        (
            "target_module",
            "targets",
            "target",
            "lora_target",
            "lora_targets",
            "lora_target_modules",
            "lora_modules",
            "modules",
        ),
        (
            Suggestion(
                f"{ADAPTER}.target_modules",
                "Write a list of names, all-linear, default or a regular expression.",
            ),
        ),
    ),
    "use_dora": (Suggestion(f"{ADAPTER}.method", "Write dora."),),
    **dict.fromkeys(
        ("ranks", "rank_patterns", "layer_ranks"),
        (Suggestion(f"{ADAPTER}.rank_pattern", "Write {pattern: rank}, as in PEFT."),),
    ),
    **dict.fromkeys(
        ("exclude", "excluded_modules", "ignore_modules", "exclude_module"),
        (Suggestion(f"{ADAPTER}.exclude_modules"),),
    ),
    **dict.fromkeys(
        ("lora_layers", "num_lora_layers", "layer_indices", "layers_to_adapt"),
        (Suggestion(f"{ADAPTER}.layers_to_transform", "Write a list of indices from 0."),),
    ),
    "lora_target_linear": (Suggestion(f"{ADAPTER}.target_modules", "Write all-linear."),),
    **dict.fromkeys(
        ("peft_type", "peft_method", "adapter", "adapter_type", "finetuning_type", "peft"),
        (Suggestion(f"{ADAPTER}.method", "Write flora, lora, dora or ia3."),),
    ),
    **dict.fromkeys(
        ("learning_rate", "learningrate", "max_lr", "base_lr", "peak_lr", "lora_lr"),
        (Suggestion(f"{ADAPTER}.lr", LR),),
    ),
    **dict.fromkeys(
        ("lr_scheduler", "lr_scheduler_type", "scheduler", "scheduler_type", "schedule", "decay_schedule"),
        (Suggestion(f"{ADAPTER}.lr_schedule", SCHEDULE),),
    ),
    **dict.fromkeys(
        ("warmup", "warmup_fraction", "warm_up", "lr_warmup"), (Suggestion(f"{ADAPTER}.warmup_ratio", RATIO),)
    ),
    **dict.fromkeys(
        ("num_warmup_steps", "lr_warmup_steps", "warmup_iters", "warm_up_steps"),
        (Suggestion(f"{ADAPTER}.warmup_steps"),),
    ),
    **dict.fromkeys(
        ("gradient_clipping", "grad_clip", "clip_grad_norm", "max_norm", "gradient_clip_val", "clip"),
        (Suggestion(f"{ADAPTER}.max_grad_norm", "Every adapter's gradient is clipped for itself."),),
    ),
    **dict.fromkeys(("wd", "decay", "weight_decay_rate", "l2"), (Suggestion(f"{ADAPTER}.weight_decay"),)),
    **dict.fromkeys(
        (
            "loraplus_lr_ratio",
            "lora_plus_lr_ratio",
            "loraplus",
            "lora_plus",
            "loraplus_ratio",
            "lr_ratio_b",
            "lora_b_lr_ratio",
        ),
        (Suggestion(f"{ADAPTER}.lr_ratio", "Write the learning rate of B as a multiple of lr, such as 16."),),
    ),
    **dict.fromkeys(
        ("neftune", "neftune_alpha", "noise_alpha", "neft_alpha", "noisy_embedding_alpha"),
        (Suggestion(f"{ADAPTER}.neftune_noise_alpha", "Write a number such as 5."),),
    ),
    **dict.fromkeys(
        ("ema", "use_ema", "ema_model", "ema_rate", "ema_beta", "ema_alpha", "ema_momentum", "polyak"),
        (Suggestion(f"{ADAPTER}.ema_decay", "Write a share such as 0.99."),),
    ),
    **dict.fromkeys(
        ("seeds", "init_seed", "model_seed", "adapter_seed", "lora_seed"),
        (Suggestion(f"{ADAPTER}.seed", "Write a number, or a list that makes an adapter for each seed."),),
    ),
    **dict.fromkeys(
        ("early_stopping_patience", "early_stopping"),
        (Suggestion(f"{ADAPTER}.patience", "Write the number of evaluations without improvement."),),
    ),
    **dict.fromkeys(
        ("early_stopping_threshold", "early_stopping_delta"), (Suggestion(f"{ADAPTER}.min_delta"),)
    ),
    "within": (Suggestion(f"{ADAPTER}.parent_module"),),
    **dict.fromkeys(
        (
            "start_from",
            "adapter_path",
            "adapter_name_or_path",
            "lora_path",
            "pretrained_adapter",
            "lora_model_dir",
            "resume_adapter",
        ),
        (Suggestion(f"{ADAPTER}.init_from", "Write the folder or hub name of a PEFT adapter."),),
    ),
    **dict.fromkeys(
        ("lora", "lora_config", "peft_config", "flora", "dora", "ia3", "methods"),
        (Suggestion("adapters", "Write adapters.NAME.method=lora and further keys below adapters.NAME."),),
    ),
    **dict.fromkeys(
        ("num_experts", "n_experts", "expert_num", "num_local_experts", "moe_num_experts", "expert_count"),
        (Suggestion(f"{ADAPTER}.experts"),),
    ),
    **dict.fromkeys(
        ("moe_top_k", "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "router_top_k"),
        (Suggestion(f"{ADAPTER}.top_k"),),
    ),
    **dict.fromkeys(
        (
            "router_aux_loss_coef",
            "router_loss_coef",
            "aux_loss_coef",
            "router_aux_loss",
            "load_balancing_loss_coef",
            "balance_loss_coef",
            "moe_aux_loss_coeff",
        ),
        (Suggestion(f"{ADAPTER}.balance_loss", "Write the coefficient; 0 switches the loss off."),),
    ),
    **dict.fromkeys(
        ("jitter_noise", "router_jitter_noise", "router_jitter", "input_jitter"),
        (Suggestion(f"{ADAPTER}.jitter", "Write a share such as 0.01; it is applied in training only."),),
    ),
    **dict.fromkeys(
        ("routing_strategy", "moe_type", "router_type"),
        (Suggestion(f"{ADAPTER}.method", "Write mixlora, meteora or switch."),),
    ),
    **dict.fromkeys(
        ("expert_lora", "expert_type", "expert_method"),
        (Suggestion(f"{ADAPTER}.expert", "Write lora, flora or ia3."),),
    ),
    # training
    **dict.fromkeys(
        (
            "epochs",
            "epoch",
            "num_epochs",
            "n_epochs",
            "max_epochs",
            "num_train_epochs",
            "train_epochs",
            "total_epochs",
        ),
        (Suggestion("training.steps", EPOCHS),),
    ),
    **dict.fromkeys(
        (
            "num_steps",
            "n_steps",
            "train_steps",
            "num_train_steps",
            "max_train_steps",
            "total_steps",
            "iterations",
            "iters",
            "max_iters",
        ),
        (Suggestion("training.steps"),),
    ),
    "max_steps": (Suggestion("training.steps"), Suggestion(f"{ADAPTER}.max_steps")),
    "steps": (
        Suggestion("training.steps"),
        Suggestion(f"{ADAPTER}.max_steps"),
        Suggestion("evaluation.interval", STEPS_BETWEEN),
    ),
    **dict.fromkeys(
        (
            "batch_size",
            "train_batch_size",
            "global_batch_size",
            "effective_batch_size",
            "batch",
            "bs",
            "batch_tokens",
            "tokens_per_batch",
        ),
        (Suggestion("training.tokens_per_step", TOKENS), Suggestion("evaluation.batch_rows")),
    ),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_batch_size",
            "micro_batch_size",
            "microbatch_size",
            "mini_batch_size",
            "train_micro_batch_size_per_gpu",
        ),
        (
            Suggestion(
                "training.tokens_per_microbatch",
                "The size of a micro-batch is given in padded tokens, not in rows.",
            ),
        ),
    ),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_batch_size"), (Suggestion("evaluation.batch_rows"),)
    ),
    **dict.fromkeys(
        (
            "gradient_accumulation_steps",
            "gradient_accumulation",
            "grad_accum",
            "grad_accum_steps",
            "accumulate_grad_batches",
        ),
        (Suggestion("training.tokens_per_microbatch", ACCUMULATION),),
    ),
    **dict.fromkeys(
        (
            "max_seq_length",
            "max_seq_len",
            "seq_len",
            "seq_length",
            "sequence_len",
            "sequence_length",
            "block_size",
            "cutoff_len",
            "context_length",
            "context_len",
            "model_max_length",
            "max_tokens",
            "max_len",
        ),
        (Suggestion("training.max_length"), Suggestion("evaluation.max_new_tokens")),
    ),
    **dict.fromkeys(
        ("optim", "optimizer_type", "optimiser"), (Suggestion("training.optimizer", "Write adamw or sgd."),)
    ),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "beta1", "beta2"),
        (Suggestion("training.betas", "Write both, such as [0.9, 0.999]."),),
    ),
    **dict.fromkeys(("adam_epsilon", "adam_eps", "epsilon"), (Suggestion("training.eps"),)),
    **dict.fromkeys(
        (
            "logging_steps",
            "log_steps",
            "log_interval",
            "logging_interval",
            "log_every_n_steps",
            "log_every_steps",
            "print_every",
        ),
        (Suggestion("training.log_every", STEPS_BETWEEN),),
    ),
    **dict.fromkeys(
        (
            "save_steps",
            "checkpoint_every",
            "save_interval",
            "checkpoint_interval",
            "checkpoint_steps",
            "ckpt_every",
            "save_freq",
        ),
        (Suggestion("training.save_every", STEPS_BETWEEN),),
    ),
    **dict.fromkeys(
        ("save_total_limit", "keep_last", "max_checkpoints"), (Suggestion("training.keep_checkpoints"),)
    ),
    **dict.fromkeys(
        ("trainer", "trainer_args", "training_args", "training_arguments", "train_config", "training_config"),
        (Suggestion("training"),),
    ),
    # evaluation
    **dict.fromkeys(
        (
            "eval_steps",
            "eval_every",
            "eval_interval",
            "evaluate_every",
            "evaluation_interval",
            "val_check_interval",
            "eval_freq",
            "evals_per_epoch",
            "validation_steps",
        ),
        (Suggestion("evaluation.interval", STEPS_BETWEEN),),
    ),
    "every": (
        Suggestion("evaluation.interval", STEPS_BETWEEN),
        Suggestion("training.log_every", STEPS_BETWEEN),
    ),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy"),
        (Suggestion("evaluation.interval", "Write the number of steps between two evaluations."),),
    ),
    **dict.fromkeys(
        ("n", "n_samples", "num_return_sequences", "samples"), (Suggestion("evaluation.num_samples"),)
    ),
    "k": (Suggestion("evaluation.pass_at_k", "Write a list such as [1, 10]."),),
    **dict.fromkeys(
        ("load_best_model_at_end", "load_best", "save_best"), (Suggestion("evaluation.select_best"),)
    ),
    **dict.fromkeys(
        ("metric_for_best_model", "best_metric", "selection_metric"),
        (Suggestion(f"{TASK}.select_by", FIGURE),),
    ),
    **dict.fromkeys(("num_beams", "beam_size", "n_beams"), (Suggestion("evaluation.beams"),)),
    "played_clips": (Suggestion("evaluation.embedded_clips"),),
    **dict.fromkeys(
        ("generation_max_length", "max_completion_length"), (Suggestion("evaluation.max_new_tokens"),)
    ),
    **dict.fromkeys(("max_eval_samples", "limit_val_batches"), (Suggestion("evaluation.max_examples"),)),
    "timeout": (Suggestion("evaluation.cpu_seconds"),),
    # model
    **dict.fromkeys(
        (
            "model_name_or_path",
            "model_name",
            "model_id",
            "base_model",
            "base_model_name_or_path",
            "pretrained_model_name_or_path",
        ),
        (Suggestion("model.path", "Write a folder or a name on the Hugging Face hub."),),
    ),
    **dict.fromkeys(("bf16", "pure_bf16"), (Suggestion("model.dtype", "Write bfloat16 in place of true."),)),
    **dict.fromkeys(
        ("fp16", "float16", "half"), (Suggestion("model.dtype", f"float16 is not supported. {BFLOAT16}"),)
    ),
    **dict.fromkeys(
        ("torch_dtype", "precision_type", "mixed_precision", "compute_dtype", "fp32", "tf32"),
        (Suggestion("model.dtype", BFLOAT16),),
    ),
    **dict.fromkeys(
        ("load_in_4bit", "bnb_4bit", "qlora"), (Suggestion("model.quantization", "Write 4bit."),)
    ),
    **dict.fromkeys(("load_in_8bit", "bnb_8bit"), (Suggestion("model.quantization", "Write 8bit."),)),
    **dict.fromkeys(
        ("quantize", "quantisation", "quantization_config"),
        (Suggestion("model.quantization", "Write none, 8bit or 4bit."),),
    ),
    **dict.fromkeys(
        ("sharded", "fsdp_config", "deepspeed"), (Suggestion("model.fsdp", "Write true or false."),)
    ),
    **dict.fromkeys(
        ("activation_checkpointing", "gradient_checkpointing_kwargs", "use_gradient_checkpointing"),
        (Suggestion("model.gradient_checkpointing", "Write off, reentrant or non_reentrant."),),
    ),
    **dict.fromkeys(
        ("flash_attention", "use_flash_attention_2", "flash_attn", "attention_implementation"),
        (Suggestion("model.attn_implementation", "Write eager, sdpa or flash_attention_2."),),
    ),
    "model_revision": (Suggestion("model.revision"),),
    # tasks and their sources
    **dict.fromkeys(
        (
            "dataset",
            "datasets",
            "data",
            "train_data",
            "train_dataset",
            "train_file",
            "train_files",
            "data_path",
            "data_files",
            "train_path",
        ),
        (
            Suggestion(
                f"{TASK}.train", "Write a file, a list of files, or a source such as {hub: ORG/NAME}."
            ),
            Suggestion(f"{TASK}.train.files"),
            Suggestion(f"{TASK}.validation.files"),
            Suggestion(f"{TASK}.test.files"),
        ),
    ),
    **dict.fromkeys(
        (
            "eval_dataset",
            "validation_file",
            "eval_data",
            "eval_file",
            "val_data",
            "valid",
            "val",
            "dev",
            "validation_data",
            "val_files",
            "eval_files",
        ),
        (Suggestion(f"{TASK}.validation"),),
    ),
    **dict.fromkeys(("test_file", "test_data", "test_dataset"), (Suggestion(f"{TASK}.test"),)),
    **dict.fromkeys(
        ("dataset_name", "dataset_name_or_path", "hf_dataset", "repo_id"),
        (
            Suggestion(f"{TASK}.train.hub"),
            Suggestion(f"{TASK}.validation.hub"),
            Suggestion(f"{TASK}.test.hub"),
        ),
    ),
    **dict.fromkeys(
        ("dataset_config", "dataset_config_name", "config_name"),
        (
            Suggestion(f"{TASK}.train.subset"),
            Suggestion(f"{TASK}.validation.subset"),
            Suggestion(f"{TASK}.test.subset"),
        ),
    ),
    "path": (
        Suggestion("model.path"),
        Suggestion(f"{TASK}.train.files"),
        Suggestion(f"{TASK}.validation.files"),
        Suggestion(f"{TASK}.test.files"),
    ),
    "dataset_split": (
        Suggestion(f"{TASK}.train.split"),
        Suggestion(f"{TASK}.validation.split"),
        Suggestion(f"{TASK}.test.split"),
    ),
    **dict.fromkeys(
        ("file", "filename", "paths"),
        (
            Suggestion(f"{TASK}.train", "Write a file or a list of files."),
            Suggestion(f"{TASK}.train.files"),
            Suggestion(f"{TASK}.validation.files"),
            Suggestion(f"{TASK}.test.files"),
        ),
    ),
    "stand_in": (
        Suggestion(f"{TASK}.train.fallback_hint"),
        Suggestion(f"{TASK}.validation.fallback_hint"),
        Suggestion(f"{TASK}.test.fallback_hint"),
    ),
    **dict.fromkeys(
        (
            "val_size",
            "test_size",
            "val_split",
            "validation_split",
            "val_set_size",
            "eval_fraction",
            "validation_size",
            "holdout",
        ),
        (Suggestion(f"{TASK}.validation_fraction", "Write a share of the training rows, such as 0.05."),),
    ),
    **dict.fromkeys(
        ("max_samples", "max_train_samples", "limit", "num_examples"), (Suggestion(f"{TASK}.max_examples"),)
    ),
    **dict.fromkeys(
        ("over_long", "overlong", "truncate"),
        (Suggestion(f"{TASK}.truncation", "Write truncate, split or drop."),),
    ),
    **dict.fromkeys(
        ("pack", "sample_packing", "multipack"), (Suggestion(f"{TASK}.packing", "Write true or false."),)
    ),
    **dict.fromkeys(
        ("text_column", "text_field", "dataset_text_field", "text_key"), (Suggestion(f"{TASK}.text"),)
    ),
    **dict.fromkeys(
        (
            "prompt_column",
            "prompt_field",
            "prompt_key",
            "prompt_template",
            "instruction",
            "input",
            "question",
            "source_column",
        ),
        (Suggestion(f"{TASK}.prompt", PROMPT),),
    ),
    **dict.fromkeys(
        (
            "completion_column",
            "response_column",
            "response",
            "answer",
            "target_column",
            "completion_key",
        ),
        (Suggestion(f"{TASK}.completion", PROMPT),),
    ),
    **dict.fromkeys(("task_column", "group_by", "split_column"), (Suggestion(f"{TASK}.split_by"),)),
    **dict.fromkeys(
        ("label", "label_column", "label_column_name", "label_field"),
        (Suggestion(f"{TASK}.label"), Suggestion(f"{TASK}.split_by")),
    ),
    **dict.fromkeys(
        ("num_labels", "id2label", "label2id", "label_list", "class_names", "classes"),
        (Suggestion(f"{TASK}.labels", "Write a list of labels."),),
    ),
    **dict.fromkeys(("class_weight", "loss_weights"), (Suggestion(f"{TASK}.class_weights"),)),
    **dict.fromkeys(("stratify_by_column", "stratified"), (Suggestion(f"{TASK}.stratify"),)),
    **dict.fromkeys(("ner_tags", "tags", "tag_column"), (Suggestion(f"{TASK}.token_labels"),)),
    "problem_type": (Suggestion(f"{TASK}.multi_label"), Suggestion(f"{TASK}.regression")),
    "lang": (Suggestion(f"{TASK}.language"), Suggestion(f"{TASK}.speech.language")),
    **dict.fromkeys(("audio_column", "audio_column_name"), (Suggestion(f"{TASK}.speech.audio"),)),
    **dict.fromkeys(("transcript", "text_column_name"), (Suggestion(f"{TASK}.speech.sentence"),)),
    **dict.fromkeys(
        ("sampling_rate", "sample_rate"),
        (Suggestion(f"{TASK}.speech.audio", "Clips are resampled as the model needs."),),
    ),
    # the run
    **dict.fromkeys(
        ("output", "out", "out_dir", "save_dir", "output_path", "output_folder", "run_dir", "checkpoint_dir"),
        (Suggestion("output_dir"),),
    ),
    **dict.fromkeys(("run_name", "experiment_name", "exp_name"), (Suggestion("name"),)),
    **dict.fromkeys(
        ("existing_run", "overwrite_output_dir", "exist_ok"), (Suggestion("overwrite", OVERWRITE),)
    ),
    **dict.fromkeys(
        ("resume_from_checkpoint", "resume_from", "auto_resume"),
        (Suggestion("resume", "Write true or false."),),
    ),
    **dict.fromkeys(("random_seed", "data_seed"), (Suggestion("seed"), Suggestion(f"{TASK}.split_seed"))),
    **dict.fromkeys(
        ("world_size", "num_gpus", "n_gpu", "devices", "nproc_per_node"), (Suggestion("num_processes"),)
    ),
    **dict.fromkeys(("threads", "cpu_threads"), (Suggestion("num_threads"),)),
    **dict.fromkeys(
        ("dataloader_num_workers", "num_workers"),
        (Suggestion("audio.workers"), Suggestion("evaluation.workers")),
    ),
    **dict.fromkeys(
        ("report_to", "logger", "loggers", "tracker", "wandb", "tensorboard", "use_wandb"),
        (Suggestion("tracking.trackers", TRACKERS),),
    ),
    **dict.fromkeys(("wandb_project", "project_name"), (Suggestion("tracking.project"),)),
    **dict.fromkeys(("wandb_group", "wandb_run_group"), (Suggestion("tracking.group"),)),
    "spike": (Suggestion("guard.spike_factor"),),
    **dict.fromkeys(
        ("sampling_strategy", "mixing_strategy", "interleave_strategy"), (Suggestion("mixture.strategy"),)
    ),
    **dict.fromkeys(
        ("metric", "figures", "figure", "compute_metrics", "eval_metrics", "metric_list", "scorers"),
        (Suggestion(f"{TASK}.metrics", METRICS),),
    ),
    **dict.fromkeys(
        ("weights", "sampling_weight", "probability", "probabilities"), (Suggestion(f"{TASK}.weight"),)
    ),
}
"""Option of another trainer, or former name -> the keys that can be meant. The first whose section the word
stands in is suggested, else the first."""
