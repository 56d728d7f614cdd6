"""COCO recipes: the paper's settings, at true input sizes; see :mod:`d2s.training.recipes`."""

from d2s.training.config import TrainConfig
from d2s.training.recipes.paper import compat, paper


def coco_vitb16_224_pretrain() -> TrainConfig:
    return paper("coco", "vitb16", 224, "pretrain")


def coco_vitb16_224_pretrain_compat() -> TrainConfig:
    return compat(paper("coco", "vitb16", 224, "pretrain"))


def coco_vitb16_224_finetune() -> TrainConfig:
    return paper("coco", "vitb16", 224, "finetune")


def coco_vitb16_224_finetune_compat() -> TrainConfig:
    return compat(paper("coco", "vitb16", 224, "finetune"))


def coco_vitb16_224_align() -> TrainConfig:
    return paper("coco", "vitb16", 224, "align")


def coco_vitb16_384_pretrain() -> TrainConfig:
    return paper("coco", "vitb16", 384, "pretrain")


def coco_vitb16_384_pretrain_compat() -> TrainConfig:
    return compat(paper("coco", "vitb16", 384, "pretrain"))


def coco_vitb16_384_finetune() -> TrainConfig:
    return paper("coco", "vitb16", 384, "finetune")


def coco_vitb16_384_finetune_compat() -> TrainConfig:
    return compat(paper("coco", "vitb16", 384, "finetune"))


def coco_vitb16_384_align() -> TrainConfig:
    return paper("coco", "vitb16", 384, "align")


def coco_vitb16_480_pretrain() -> TrainConfig:
    return paper("coco", "vitb16", 480, "pretrain")


def coco_vitb16_480_pretrain_compat() -> TrainConfig:
    return compat(paper("coco", "vitb16", 480, "pretrain"))


def coco_vitb16_480_finetune() -> TrainConfig:
    return paper("coco", "vitb16", 480, "finetune")


def coco_vitb16_480_finetune_compat() -> TrainConfig:
    return compat(paper("coco", "vitb16", 480, "finetune"))


def coco_vitb16_480_align() -> TrainConfig:
    return paper("coco", "vitb16", 480, "align")


def coco_swinb_224_pretrain() -> TrainConfig:
    return paper("coco", "swinb", 224, "pretrain")


def coco_swinb_224_pretrain_compat() -> TrainConfig:
    return compat(paper("coco", "swinb", 224, "pretrain"))


def coco_swinb_224_finetune() -> TrainConfig:
    return paper("coco", "swinb", 224, "finetune")


def coco_swinb_224_finetune_compat() -> TrainConfig:
    return compat(paper("coco", "swinb", 224, "finetune"))


def coco_swinb_224_align() -> TrainConfig:
    return paper("coco", "swinb", 224, "align")


def coco_swinb_384_pretrain() -> TrainConfig:
    return paper("coco", "swinb", 384, "pretrain")


def coco_swinb_384_pretrain_compat() -> TrainConfig:
    return compat(paper("coco", "swinb", 384, "pretrain"))


def coco_swinb_384_finetune() -> TrainConfig:
    return paper("coco", "swinb", 384, "finetune")


def coco_swinb_384_finetune_compat() -> TrainConfig:
    return compat(paper("coco", "swinb", 384, "finetune"))


def coco_swinb_384_align() -> TrainConfig:
    return paper("coco", "swinb", 384, "align")
