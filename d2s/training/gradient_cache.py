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

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2s.data.loader import Batch
from d2s.losses.objective import Objective


def check_norms(model: nn.Module, micro_batch: int, local_batch: int) -> None:
    """Raises ValueError, in one line, where micro-batches meet a BatchNorm that is trained."""
    training = model.training
    model.train()  # frozen towers stay in eval mode, where statistics are fixed
    trained = [
        name for name, child in model.named_modules() if isinstance(child, _BatchNorm) and child.training
    ]
    model.train(training)
    if trained:
        refuse_batch_norm(trained[0], micro_batch, local_batch)


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


class GradientCache:
    """One step's batch in micro-batches of `size` pairs; the last one may be smaller.

    engine: DeepSpeed's, around a TrainingModule. seed(number): seeds torch for a micro-batch. poll(): called before
    each micro-batch of both passes, on all workers alike. It may raise to drop the step, which then has changed
    neither weights nor optimizer nor buffers.
    """

    def __init__(
        self, engine: Any, batch: Batch, size: int, device: torch.device,
        *, seed: Callable[[int], None], poll: Callable[[], None],
    ) -> None:  # fmt: skip
        assert size >= 1, "empty micro-batches"
        self.engine, self.batch, self.size, self.device = engine, batch, size, device
        self.seed, self.poll = seed, poll
        self.embeddings: tuple[Tensor, ...] = ()
        """image and text (B, D) of step 1."""
        self.grads: list[Tensor | None] = []
        """Gradient of the total by image (B, D), text (B, D), and each of the objective's factors (1,)."""

    def _micro_batches(self) -> Iterator[tuple[int, Batch]]:
        for number, start in enumerate(range(0, len(self.batch), self.size)):
            self.poll()
            part = self.batch.rows(start, start + self.size).to(self.device)
            self.seed(number)
            yield number, part

    def losses(
        self, objective: Objective, warmup: float, teacher: Callable[[Batch], Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Steps 1 and 2: this worker's share of (total, align, distill), 0-dim, without gradient.

        teacher(part): embeddings (B, D) of a micro-batch's dense captions; None without distillation.
        """
        images, texts, targets = [], [], []
        with torch.no_grad():
            for _, part in self._micro_batches():
                image, text, *factors = self.engine(part, embed_only=True)
                images.append(image)
                texts.append(text)
                targets.append(teacher(part))
        target = None if targets[0] is None else torch.cat(targets)
        leaves = [leaf.detach().requires_grad_() for leaf in (torch.cat(images), torch.cat(texts), *factors)]
        image, text, *factors = leaves
        self.embeddings = (image.detach(), text.detach())
        ids = self.batch.image_ids.to(self.device)
        losses = objective.losses(image, text, ids, tuple(factors), warmup=warmup, teacher=target)
        self.grads = list(torch.autograd.grad(losses.total, leaves, allow_unused=True))
        return losses.total.detach(), losses.align, losses.distill

    def backward(self, factor: float) -> None:
        """Step 3: leaves the gradient of `factor` times the total in the engine."""
        assert self.grads, "call losses() first"
        last = (len(self.batch) - 1) // self.size
        for number, part in self._micro_batches():
            self.engine.set_gradient_accumulation_boundary(number == last)
            outputs = self.engine(part, embed_only=True)
            self.engine.backward(factor * self._surrogate(outputs, number))

    def _surrogate(self, outputs: tuple[Tensor, ...], number: int) -> Tensor:
        """A 0-dim loss whose gradient by the outputs of micro-batch `number` is the cached one."""
        rows = slice(number * self.size, (number + 1) * self.size)
        terms = []
        for place, (output, grad) in enumerate(zip(outputs, self.grads, strict=True)):
            if grad is None:
                continue  # the loss does not depend on this output
            if place < 2:
                grad = grad[rows]
            elif number:
                # The objective's own parameters get their gradient once. Later it is zero rather than absent: an
                # engine that divides gradients expects the same parameters in every pass.
                grad = torch.zeros_like(grad)
            terms.append((output * grad).sum())
        return torch.stack(terms).sum()
