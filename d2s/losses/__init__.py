"""The objective: alignment of images with captions, plus distillation of dense captions into sparse ones.

To add a loss: write its class in a file of its own, derived from `Alignment` or `Distillation` (base.py), which list
what it must provide: the values by `d2s.kernels.functional`, a rule for the ring of workers (ring.py), its learned
numbers, the bytes it exchanges. Then add one line to the table (table.py) and its name to the choices of
`LossConfig`; it is the value of --loss.align or --loss.distill. tests/d2s/losses checks that both agree, and compares
every loss of the table between exchanges and numbers of workers.
"""
