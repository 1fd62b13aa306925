"""PEFT folders, merged models, model cards and the Hugging Face hub."""
