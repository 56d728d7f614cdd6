"""Exact accumulation (gradient caching): a batch that does not fit is embedded a few pairs at a time.

The losses compare every pair of a global batch with every other, so gradients of small batches do not add up to
that of a large one. But a loss reaches the model through the embeddings alone:

1. embed every micro-batch without a graph, and keep the embeddings (D numbers a pair and side);
2. the loss over the whole global batch, and its gradient with respect to the embeddings and to the objective's
   own scale and bias;
3. embed every micro-batch again, with a graph, and send its share of that gradient backward.

The engine adds up what step 3 gives, and exchanges it between workers after the last micro-batch (with ZeRO 2 and 3,
which divide gradients, after each). By the chain rule that is the gradient of the whole batch; it differs from it
by rounding. Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(RepL4NLP 2021).

Draws. Steps 1 and 3 draw alike to the bit. Augmentation, token dropout and, where engine.micro_batch is set, the
dropout behind the text tower (model.text_dropout) follow from each sample's own seed: the gradient is that of the
whole batch (a micro-batch as large as the worker's share) whatever the size. Dropout inside a Hugging Face tower
follows from (seed, step, worker, micro-batch): as random and as repeatable as ever, but drawn anew for another size.
With engine.micro_batch 0 text_dropout too is drawn by place in the batch, from (seed, step, worker).

Statistics of a batch (BatchNorm in training) tie an embedding to its batch mates, which a micro-batch does not
have: :func:`check_norms` refuses them. So no buffer of the model moves.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2s.data.batch import Batch
from d2s.losses.objective import Objective


def check_norms(model: nn.Module, micro_batch: int, local_batch: int) -> None:
    """ValueError, in one line, where micro-batches are to be embedded with statistics of a whole batch."""
    training = model.training
    model.train()  # frozen towers stay in eval mode, where statistics are held
    tied = [name for name, child in model.named_modules() if isinstance(child, _BatchNorm) and child.training]
    model.train(training)
    if tied:
        refuse_batch_norm(tied[0], micro_batch, local_batch)


def refuse_batch_norm(name: str, micro_batch: int, local_batch: int) -> None:
    """The ValueError of :func:`check_norms` for the BatchNorm of that name, where there are micro-batches."""
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
    """One step's batch in micro-batches of up to `size` pairs; the last one may have fewer.

    engine: what the training module is wrapped in. seed(number) seeds the generators for a micro-batch. poll() is
    called before each micro-batch of both passes, on all workers alike, and may raise to leave the step: weights,
    optimizer and buffers are then as they were before it.
    """

    def __init__(
        self, engine: Any, batch: Batch, size: int, device: torch.device,
        *, seed: Callable[[int], None], poll: Callable[[], None],
    ) -> None:  # fmt: skip
        assert size >= 1, "micro-batches of nothing"
        self.engine, self.batch, self.size, self.device = engine, batch, size, device
        self.seed, self.poll = seed, poll
        self.embeddings: tuple[Tensor, ...] = ()
        """image and text (B, D), once they are made."""
        self.grads: list[Tensor | None] = []
        """Of the total with respect to image (B, D), text (B, D), and each of the objective's factors (1,)."""

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

        teacher(part): embeddings of the dense captions of a micro-batch, or None where nothing is distilled.
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
        image, text, *rest = leaves
        self.embeddings = (image.detach(), text.detach())
        ids = self.batch.image_ids.to(self.device)
        losses = objective.losses(image, text, ids, tuple(rest), warmup=warmup, teacher=target)
        self.grads = list(torch.autograd.grad(losses.total, leaves, allow_unused=True))
        return losses.total.detach(), losses.align, losses.distill

    def backward(self, factor: float) -> None:
        """Step 3: the gradient of `factor` times the total, in the engine, ready for its step."""
        assert self.grads, "losses() comes first"
        count = -(-len(self.batch) // self.size)
        for number, part in self._micro_batches():
            self.engine.set_gradient_accumulation_boundary(number == count - 1)
            outputs = self.engine(part, embed_only=True)
            self.engine.backward(factor * self._pull(outputs, number))

    def _pull(self, outputs: tuple[Tensor, ...], number: int) -> Tensor:
        """A 0-dim number whose gradient is the cached one of micro-batch `number`."""
        rows = slice(number * self.size, (number + 1) * self.size)
        terms = []
        for place, (output, grad) in enumerate(zip(outputs, self.grads, strict=True)):
            if grad is None:
                continue  # the loss does not depend on it: what it is made from gets no gradient at all
            if place < 2:
                grad = grad[rows]
            elif number:
                # The objective's own parameters get theirs once; a zero, because an engine that divides gradients
                # wants the same parameters in every pass.
                grad = torch.zeros_like(grad)
            terms.append((output * grad).sum())
        return torch.stack(terms).sum()
