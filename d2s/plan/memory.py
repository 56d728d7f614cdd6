"""Estimates how many bytes a training needs on each worker, for each part of the memory and each ZeRO stage."""

from d2s.kernels.chunked.common import CHUNK_ENTRIES, MIN_ROWS
from d2s.losses.table import losses_of
from d2s.plan.sizes import Sizes
from d2s.plan.traffic import FP32
from d2s.training.config import TrainConfig

PARTS = ("weights", "gradients", "optimizer", "buckets", "activations", "gathered", "loss")


def memory(
    config: TrainConfig, sizes: Sizes, workers: int, stage: int, batch: int, bucket: int
) -> dict[str, int]:
    """Maps each name in PARTS to its bytes on one worker, for ZeRO `stage` and a global batch of `batch` pairs.

    bucket: size of DeepSpeed's communication bucket, in numbers of 4 bytes. It does not depend on the model.
    """
    divided = workers if stage else 1
    learned, width = FP32 * sizes.learned, config.model.width
    # ZeRO 3 divides all weights of the model, also frozen weights. It does not divide an online teacher.
    model, teacher = FP32 * sizes.parameters, FP32 * sizes.teacher
    local = batch // workers
    micro_batch = config.engine.micro_batch or local
    embedded = min(micro_batch, local)
    cached = 4 * FP32 * width * local if micro_batch < local else 0
    # ZeRO 3 keeps up to 10^9 gathered weights from the forward pass to the backward pass.
    gathered_weights = min(model, FP32 * 10**9) if stage == 3 else 0
    copies = 3 if stage else 2  # AdamW's two moments, and ZeRO's flat fp32 copy of the weights
    offloaded = config.engine.offload_optimizer and stage
    columns = batch if config.loss.exchange == "gather" else 2 * local
    gathered = sum(loss.gathered_sides for loss in losses_of(config.loss))
    rows = min(local, max(MIN_ROWS, CHUNK_ENTRIES // max(columns, 1)))
    return {
        "weights": teacher + model // (workers if stage == 3 else 1),
        "gradients": learned // (workers if stage >= 2 else 1),
        "optimizer": 0 if offloaded else copies * learned // divided,
        "buckets": (FP32 * bucket if stage else 0) + gathered_weights,
        "activations": sizes.saved + sizes.saved_per_pair * embedded + cached,
        "gathered": gathered * FP32 * width * columns if workers > 1 else 0,
        "loss": 3 * FP32 * rows * columns,
    }


def largest_batch(config: TrainConfig, sizes: Sizes, workers: int, stage: int, room: int, bucket: int) -> int:
    """Returns the largest global batch that needs at most `room` bytes on each worker, or 0 if no batch fits."""

    def fits(local: int) -> bool:
        if sizes.batch_norm and 0 < config.engine.micro_batch < local:
            return False  # training raises an error for micro-batches with a BatchNorm
        return sum(memory(config, sizes, workers, stage, local * workers, bucket).values()) <= room

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * workers
