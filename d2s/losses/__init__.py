"""The objective: alignment of images with captions, plus distillation of dense captions into sparse ones.

To add a loss, write a class in a new file, derived from `Alignment` or `Distillation` (base.py). These base classes
list the methods to write: the loss value through `d2s.kernels.functional`, the same value around the ring of workers
(ring.py), the learned numbers, and the bytes exchanged. Then add the class to the table (table.py), and its name to
the choices of --loss.align or --loss.distill in `LossConfig`. tests/d2s/losses checks that the table and `LossConfig`
list the same names, and that a loss has the same value with either exchange and any number of workers.
"""
