"""The objective: alignment of images with captions, plus distillation of dense captions into sparse ones.

To add a loss, write a class in a new file, derived from `Alignment` or `Distillation` (base.py). These base classes
list the methods to write: the loss value through `d2s.kernels.functional`, the same value around the ring of workers
(ring.py), the learned numbers, and the bytes exchanged. Then add the class to the table (table.py). Add the name of
the loss to the choices of --loss.align or --loss.distill in `LossConfig`. The tests in tests/d2s/losses check that
the table and `LossConfig` list the same names. They also check that a loss has the same value with `gather` as with
`ring`, and with any number of workers.
"""
