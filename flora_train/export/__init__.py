"""How do adapters leave the run? PEFT folders that plain `peft` loads, and merged models."""
