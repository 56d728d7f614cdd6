"""Gradient caching: exact gradients of a batch that is embedded a few pairs at a time.

The losses compare every pair of a global batch with every other, so gradients of small batches do not add up to
that of a large one. But a loss depends on the model only through the embeddings:

1. embed every micro-batch without a graph, and keep the embeddings (D numbers per pair and side);
2. compute the loss over the whole global batch, and its gradient with respect to the embeddings and to the
   objective's own scale and bias;
3. embed every micro-batch again, with a graph, and backpropagate its rows of that gradient.

The engine adds up the gradients of step 3 and exchanges them between workers after the last micro-batch (with ZeRO 2
and 3, which divide gradients, after each one). By the chain rule the sum is the gradient of the whole batch, up to
rounding. Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.

Randomness. Steps 1 and 3 draw the same to the last bit. Augmentation, token dropout and, where engine.micro_batch is
set, the dropout after the text tower (model.text_dropout) follow from each sample's own seed, so they do not depend
on the micro-batch size. Dropout inside a Hugging Face tower follows from (seed, step, worker, micro-batch): it is
repeatable, but another size draws differently. With engine.micro_batch 0, text_dropout depends on the place in the
batch and follows from (seed, step, worker) as well.

BatchNorm in training ties an embedding to the other pairs of the batch, which a micro-batch does not have:
:func:`check_norms` refuses it. So the passes change no buffer of the model.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2s.data.batch import Batch
from d2s.model import Teacher
from d2s.training.nonfinite import NonFiniteDetector
from d2s.training.step import WholeBatch, seed_dropout
from d2s.training.teacher_table import TeacherTable
from d2s.workers.group import Workers
from d2s.workers.preemption import Preemption


def trained_batch_norms(model: nn.Module) -> list[str]:
    """Names of the BatchNorms that are trained."""
    training = model.training
    model.train()  # frozen towers stay in eval mode, where statistics are fixed
    norms = {name: child for name, child in model.named_modules() if isinstance(child, _BatchNorm)}
    trained = [name for name, norm in norms.items() if norm.training]
    model.train(training)
    return trained


def check_norms(model: nn.Module, micro_batch: int, local_batch: int) -> None:
    """Raises ValueError, in one line, where micro-batches meet a BatchNorm that is trained."""
    for name in trained_batch_norms(model):
        refuse_batch_norm(name, micro_batch, local_batch)


def refuse_batch_norm(name: str, micro_batch: int, local_batch: int) -> None:
    """Raises the ValueError of :func:`check_norms` for the BatchNorm called `name`, if there are micro-batches."""
    if not 0 < micro_batch < local_batch:
        return
    remedy = "choose a tower without BatchNorm (ViT, Swin, ConvNeXt)"
    if name.startswith("text_encoder.mlp."):
        remedy = "set model.text_mlp_norm to layer"
    raise ValueError(
        f"engine.micro_batch is {micro_batch} of a worker's {local_batch} pairs, but {name} is a BatchNorm, which "
        f"needs them all at once: {remedy}, or set engine.micro_batch to 0"
    )


class MicroBatches(WholeBatch):
    """Forward and backward pass of a worker's part of a batch, `size` pairs at a time; the last part may be smaller.

    Both passes raise Preempted, on all workers, after a stop signal. The step is then dropped: it has changed neither
    weights nor optimizer nor buffers.
    """

    def __init__(
        self, engine: Any, teacher: Teacher | TeacherTable | None, workers: Workers, seed: int,
        *, size: int, detector: NonFiniteDetector, preemption: Preemption,
    ) -> None:  # fmt: skip
        super().__init__(engine, teacher, workers, seed)
        self.size, self.detector, self.preemption = size, detector, preemption

    def forward(self, batch: Batch, step: int, warmup: float) -> tuple[Tensor, Tensor, Tensor]:
        """Steps 1 and 2. Returns the same losses as WholeBatch, without gradient: `backward` uses the cached one."""
        self.batch, self.step = batch, step
        images, texts, targets = [], [], []
        with torch.no_grad():
            for _, part in self._parts():
                image, text, *factors = self.engine(part, embed_only=True)
                images.append(image)
                texts.append(text)
                targets.append(self.teacher_embeddings(part))
        target = None if targets[0] is None else torch.cat(targets)
        leaves = [leaf.detach().requires_grad_() for leaf in (torch.cat(images), torch.cat(texts), *factors)]
        image, text, *factors = leaves
        ids = batch.image_ids.to(self.workers.device)
        objective = self.engine.module.objective
        losses = objective.losses(image, text, ids, tuple(factors), warmup=warmup, teacher=target)
        # Gradient of the total by image (B, D), text (B, D), and each of the objective's factors (1,).
        self.gradients = torch.autograd.grad(losses.total, leaves, allow_unused=True)
        self.detector.inspect(image, text)
        return losses.total.detach(), losses.align, losses.distill

    def backward(self, total: Tensor) -> None:
        """Step 3: leaves the gradient of the global loss in the engine."""
        last = (len(self.batch) - 1) // self.size
        for number, part in self._parts():
            self.engine.set_gradient_accumulation_boundary(number == last)
            outputs = self.engine(part, embed_only=True)
            # The engine averages gradients over workers, and the loss is the sum of their shares.
            self.engine.backward(self.workers.world * self._surrogate(outputs, number))

    def _parts(self) -> Iterator[tuple[int, Batch]]:
        """Number and content of each micro-batch, on the device, with the dropout seeded for it."""
        for number, start in enumerate(range(0, len(self.batch), self.size)):
            self.preemption.check()
            part = self.batch.rows(start, start + self.size).to(self.workers.device)
            seed_dropout(self.seed, self.step, self.workers.rank, number)
            yield number, part

    def _surrogate(self, outputs: tuple[Tensor, ...], number: int) -> Tensor:
        """A 0-dim loss whose gradient by the outputs of micro-batch `number` is the cached one."""
        rows = slice(number * self.size, (number + 1) * self.size)
        terms = []
        for place, (output, gradient) in enumerate(zip(outputs, self.gradients, strict=True)):
            if gradient is None:
                continue  # the loss does not depend on this output
            if place < 2:
                gradient = gradient[rows]
            elif number:
                # The objective's own parameters get their gradient once. Later it is zero rather than absent: an
                # engine that divides gradients expects the same parameters in every pass.
                gradient = torch.zeros_like(gradient)
            terms.append((output * gradient).sum())
        return torch.stack(terms).sum()
