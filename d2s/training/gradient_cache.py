"""Gradient caching: computes the exact gradient of a batch while only a few pairs are embedded at a time.

The losses compare every pair of a global batch with every other pair. So the gradients of small batches do not add up
to the gradient of a large batch. But a loss depends on the model only through the embeddings. So a training step has
three phases:

1. Embed every micro-batch without a graph, and keep the embeddings: two vectors of D numbers for each pair.
2. Compute the loss over the global batch, and its gradient with respect to the embeddings, the scale and the bias.
3. Embed every micro-batch again, with a graph, and backpropagate the gradient of its embeddings from phase 2.

The engine adds up the gradients of phase 3 and exchanges them between workers after the last micro-batch. (ZeRO 2 and
3 divide the gradients among workers, and exchange them after each micro-batch.) By the chain rule the sum is the
gradient of the whole batch, up to rounding. Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup", 2021.

Phases 1 and 3 use the same random numbers. Augmentation and token dropout depend on the seed of each sample, and not
on the micro-batch size. Dropout inside a Hugging Face tower depends on (seed, training step, worker, micro-batch). It
is repeatable, but differs for another micro-batch size. The dropout after the text tower (model.text_dropout) depends
on the seed of each sample if there are micro-batches, else on (seed, training step, worker, position in the batch).

In a BatchNorm with batch statistics, an embedding depends on all pairs of the batch. :func:`check_norms` refuses such
a model. Therefore the phases change no buffer of the model.
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
    """Returns the names of the BatchNorm modules that use batch statistics in training. Skips frozen towers."""
    training = model.training
    model.train()  # frozen towers stay in eval mode and use fixed statistics
    norms = {name: child for name, child in model.named_modules() if isinstance(child, _BatchNorm)}
    trained = [name for name, norm in norms.items() if norm.training]
    model.train(training)
    return trained


def check_norms(model: nn.Module, micro_batch: int, local_batch: int) -> None:
    """Raises ValueError if micro-batches are used and the model has a BatchNorm outside frozen towers.
    micro_batch: EngineConfig.micro_batch. local_batch: number of pairs of each worker."""
    for name in trained_batch_norms(model):
        refuse_batch_norm(name, micro_batch, local_batch)


def refuse_batch_norm(name: str, micro_batch: int, local_batch: int) -> None:
    """Raises ValueError about the BatchNorm module `name` if micro-batches are used. See :func:`check_norms`."""
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
    """Runs the forward and backward pass of a worker's part of a batch, in micro-batches of at most `size` pairs.

    After a stop signal both passes raise Preempted on all workers. The caller drops the training step. Until then the
    step has changed no weights, no optimizer state and no buffers.
    """

    def __init__(
        self, engine: Any, teacher: Teacher | TeacherTable | None, workers: Workers, seed: int,
        *, size: int, detector: NonFiniteDetector, preemption: Preemption,
    ) -> None:  # fmt: skip
        super().__init__(engine, teacher, workers, seed)
        self.size, self.detector, self.preemption = size, detector, preemption

    def forward(self, batch: Batch, step: int, warmup: float) -> tuple[Tensor, Tensor, Tensor]:
        """Runs phases 1 and 2. Returns the same losses as `WholeBatch.forward`, but `total` has no gradient.
        Stores the gradients with respect to the embeddings for :meth:`backward`."""
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
        # Gradients with respect to image and text, of shape (B, D), and to scale and bias, of shape (1,), if any.
        self.gradients = torch.autograd.grad(losses.total, leaves, allow_unused=True)
        self.detector.inspect(image, text)
        return losses.total.detach(), losses.align, losses.distill

    def backward(self, total: Tensor) -> None:
        """Runs phase 3, which leaves the gradient of the global loss in the engine. Ignores `total`."""
        last = (len(self.batch) - 1) // self.size
        for number, part in self._parts():
            self.engine.set_gradient_accumulation_boundary(number == last)
            outputs = self.engine(part, embed_only=True)
            # The engine averages gradients over workers, but the loss is the sum of their parts.
            self.engine.backward(self.workers.world * self._surrogate(outputs, number))

    def _parts(self) -> Iterator[tuple[int, Batch]]:
        """Yields the number of each micro-batch, and the micro-batch on the device. Seeds torch's dropout for it."""
        for number, start in enumerate(range(0, len(self.batch), self.size)):
            self.preemption.check()
            part = self.batch.rows(start, start + self.size).to(self.workers.device)
            seed_dropout(self.seed, self.step, self.workers.rank, number)
            yield number, part

    def _surrogate(self, outputs: tuple[Tensor, ...], number: int) -> Tensor:
        """Returns a loss, of shape (), whose gradient with respect to `outputs` is the gradient stored by `forward`.
        outputs: embeddings, scale and bias of micro-batch `number`."""
        rows = slice(number * self.size, (number + 1) * self.size)
        terms = []
        for place, (output, gradient) in enumerate(zip(outputs, self.gradients, strict=True)):
            if gradient is None:
                continue  # the loss does not depend on this output
            if place < 2:
                gradient = gradient[rows]
            elif number:
                # Scale and bias get their gradient in the first micro-batch. In later ones it is zero and not
                # missing, because ZeRO 2 and 3 expect gradients of the same parameters in every pass.
                gradient = torch.zeros_like(gradient)
            terms.append((output * gradient).sum())
        return torch.stack(terms).sum()
