"""Adapter computations as pure functions on grouped tokens. Each method has a folder:

reference.py           the specification: the formula, a loop, plain autograd
materialised.py, batched.py, grouped.py
                       fast implementations in PyTorch, with hand-written gradients
triton_*.py            Triton kernels
op.py                  the public op: checks and dispatch

Shared modules: segments.py (which tokens belong to which adapter), backend.py (the requested backend), autocast.py,
adamw_triton.py (the bank's optimizer step), triton_common.py, cpu_threads.py.
"""
