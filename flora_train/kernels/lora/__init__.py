"""LoRA: reference, PyTorch and Triton implementations, and the public op."""
