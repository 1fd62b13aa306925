"""Serves trained adapters: fLoRA, LoRA, IA3 and the base model mixed in one batch of vLLM."""
