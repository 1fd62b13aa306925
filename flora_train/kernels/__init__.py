"""How does each row of a batch meet its own adapter? Pure functions on grouped tokens, one file per question:

<method>_reference.py  the specification: the formula, a loop, plain autograd
<method>_torch.py      the fast path in torch, with hand-written gradients (IA3's is short enough for ia3.py)
<method>_grouped.py    where there are other devices: all adapters at once, without a loop
<method>.py            the public op: checks and dispatch
segments.py            which tokens are whose; threads.py: how a CPU's threads share them out
"""
