"""Estimates how many bytes a worker sends in a training step, for each part and each ZeRO stage."""

from d2s.losses.table import losses_of
from d2s.plan.sizes import Sizes
from d2s.training.config import TrainConfig

FP32 = 4
"""Bytes of a float32 number."""


def traffic(config: TrainConfig, sizes: Sizes, workers: int, stage: int, batch: int) -> dict[str, int]:
    """Maps each part to the bytes that a worker sends in a training step, for a global batch of `batch` pairs.

    Collectives run in a ring of W workers. To all-gather M bytes, each worker sends (W - 1) / W * M bytes. To
    all-reduce M bytes, each worker sends twice as much.
    """
    share = (workers - 1) / workers
    learned, frozen = FP32 * sizes.learned, FP32 * (sizes.parameters - sizes.learned)
    local = batch // workers
    pieces = config.engine.micro_batch
    passes = -(-local // pieces) if 0 < pieces < local else 1
    # ZeRO 1 and 2 reduce each gradient to one worker and gather the updated weights. Both together send as much as
    # an all-reduce. ZeRO 3 gathers weights for each forward and each backward pass. A micro-batch takes two forward
    # passes and a backward pass. ZeRO 2 and 3 reduce the gradients after each backward pass.
    gathered = learned if stage in (1, 2) else 0
    if stage == 3:
        forward = 2 * passes if passes > 1 else 1
        gathered = forward * (learned + frozen) + passes * learned
    row = FP32 * config.model.width
    sent = [loss.bytes_sent(workers, local, row) for loss in losses_of(config.loss) if workers > 1]
    return {
        "gradients": int(share * learned * (2 if stage == 0 else passes if stage > 1 else 1)),
        "weights": int(share * gathered),
        "embeddings": sum(embeddings for embeddings, _ in sent),
        "their gradients": sum(gradients for _, gradients in sent),
    }
