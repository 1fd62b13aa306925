"""How does each row of a batch meet its own adapter? Pure functions on grouped tokens, one file per question:

<method>_reference.py  the specification: the formula, a loop, plain autograd
<method>_torch.py      the fast path in torch, with hand-written gradients; flora_grouped.py: all adapters at once
<method>_triton.py     our own kernels, fLoRA's in flora_matmul_triton.py and flora_gradient_triton.py; blocks.py: which tokens a
                       program takes; flora_tiles.py: how large its tiles are; adamw_triton.py: the bank's optimizer step
<method>.py            the public op: checks and dispatch
cost_model.py          which formulation is fastest; backend.py: what the run asked for; autocast.py
segments.py            which tokens are whose; threads.py: how a CPU's threads share them out
"""
