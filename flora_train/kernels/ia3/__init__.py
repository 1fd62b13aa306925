"""IA3: reference, PyTorch and Triton implementations, and the public op."""
