"""Adapter computations as pure functions on tokens grouped by adapter. Each method has a folder:

reference.py            the specification: the formula, a loop, plain autograd
materialised.py, batched.py, grouped.py
                        fast implementations in PyTorch, with hand-written gradients
triton_*.py             Triton kernels
op.py                   the public op: checks and dispatch

Shared modules: segments.py (tokens of each adapter), backend.py (backend and precision), autocast.py,
adamw_triton.py (the optimizer step), triton_common.py, cpu_threads.py.

Dimensions: T tokens, K segments (one per adapter), r rank, in and out features.
"""
