"""Bytes that a worker sends in a step of training, by part and ZeRO stage."""

from d2s.losses.objective import LossConfig
from d2s.plan.sizes import Sizes
from d2s.training.config import TrainConfig

FP32 = 4
"""Bytes of a number."""


def traffic(config: TrainConfig, sizes: Sizes, workers: int, stage: int, batch: int) -> dict[str, int]:
    """Bytes that one worker sends in a step, by part, with ZeRO `stage` and a global `batch`.

    Collectives run in a ring: of W workers, each sends (W - 1) / W * M bytes to gather M bytes, and twice that to
    reduce M bytes to all.
    """
    share = (workers - 1) / workers
    learned, frozen = FP32 * sizes.learned, FP32 * (sizes.parameters - sizes.learned)
    local = batch // workers
    pieces = config.engine.micro_batch
    passes = -(-local // pieces) if 0 < pieces < local else 1
    # ZeRO 1 and 2 reduce each gradient to one worker and gather the updated weights, together as much as a reduction
    # to all. ZeRO 3 gathers weights for each forward and each backward pass. A micro-batch takes two forward passes
    # and a backward one; ZeRO 2 and 3, which divide gradients, reduce them after each of these.
    gathered = learned if stage in (1, 2) else 0
    if stage == 3:
        forward = 2 * passes if passes > 1 else 1
        gathered = forward * (learned + frozen) + passes * learned
    there, back = _exchanged(config.loss, FP32 * config.model.width, workers, local)
    return {
        "gradients": int(share * learned * (2 if stage == 0 else passes if stage > 1 else 1)),
        "weights": int(share * gathered),
        "embeddings": there,
        "their gradients": back,
    }


def _exchanged(loss: LossConfig, row: int, workers: int, local: int) -> tuple[int, int]:
    """Bytes of embeddings, and of their gradients, that a worker sends in a step; an embedding has `row` bytes.

    The hinge loss is counted as after its warm-up.
    """
    if workers == 1:
        return 0, 0
    ring, there, back = loss.exchange == "ring", 0, 0
    # One side, images or captions, to all other workers, gathered or passed on in the ring.
    side = (workers - 1) * local * row
    # In the ring the columns go round again to collect their gradients, and one hop more to return.
    home = local * row if ring else 0
    if loss.align_weight:
        # The sigmoid loss has only captions as columns; a gather brings both sides all the same.
        columns = 1 if loss.align == "sigmoid" else 2
        there += (columns if ring else 2) * side
        if loss.align == "hinge":
            # Only the hardest negative of each row gets a gradient, sent with its number in both exchanges.
            back += 2 * (workers - 1) * local * (row + 8) // workers
        else:
            back += columns * (2 * side + home if ring else side)
    if relational(loss):
        # Captions, and the teacher's embeddings, which have no gradient.
        there += 2 * side
        back += 3 * side + home if ring else side
    return there, back


def relational(loss: LossConfig) -> bool:
    """Whether the loss distills similarities between captions."""
    return bool(loss.distill_weight) and loss.distill == "relational"
