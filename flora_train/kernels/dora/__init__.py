"""DoRA: reference and the public ops, which use the implementations of LoRA and IA3."""
