"""Flickr30K recipes: the paper's settings, at true input sizes; see :mod:`d2s.training.recipes`."""

from d2s.training.config import TrainConfig
from d2s.training.recipes.paper import compat, paper


def f30k_vitb16_224_pretrain() -> TrainConfig:
    return paper("f30k", "vitb16", 224, "pretrain")


def f30k_vitb16_224_pretrain_compat() -> TrainConfig:
    return compat(paper("f30k", "vitb16", 224, "pretrain"))


def f30k_vitb16_224_finetune() -> TrainConfig:
    return paper("f30k", "vitb16", 224, "finetune")


def f30k_vitb16_224_finetune_compat() -> TrainConfig:
    return compat(paper("f30k", "vitb16", 224, "finetune"))


def f30k_vitb16_224_align() -> TrainConfig:
    return paper("f30k", "vitb16", 224, "align")


def f30k_vitb16_384_pretrain() -> TrainConfig:
    return paper("f30k", "vitb16", 384, "pretrain")


def f30k_vitb16_384_pretrain_compat() -> TrainConfig:
    return compat(paper("f30k", "vitb16", 384, "pretrain"))


def f30k_vitb16_384_finetune() -> TrainConfig:
    return paper("f30k", "vitb16", 384, "finetune")


def f30k_vitb16_384_finetune_compat() -> TrainConfig:
    return compat(paper("f30k", "vitb16", 384, "finetune"))


def f30k_vitb16_384_align() -> TrainConfig:
    return paper("f30k", "vitb16", 384, "align")


def f30k_vitb16_480_pretrain() -> TrainConfig:
    return paper("f30k", "vitb16", 480, "pretrain")


def f30k_vitb16_480_pretrain_compat() -> TrainConfig:
    return compat(paper("f30k", "vitb16", 480, "pretrain"))


def f30k_vitb16_480_finetune() -> TrainConfig:
    return paper("f30k", "vitb16", 480, "finetune")


def f30k_vitb16_480_finetune_compat() -> TrainConfig:
    return compat(paper("f30k", "vitb16", 480, "finetune"))


def f30k_vitb16_480_align() -> TrainConfig:
    return paper("f30k", "vitb16", 480, "align")


def f30k_swinb_224_pretrain() -> TrainConfig:
    return paper("f30k", "swinb", 224, "pretrain")


def f30k_swinb_224_pretrain_compat() -> TrainConfig:
    return compat(paper("f30k", "swinb", 224, "pretrain"))


def f30k_swinb_224_finetune() -> TrainConfig:
    return paper("f30k", "swinb", 224, "finetune")


def f30k_swinb_224_finetune_compat() -> TrainConfig:
    return compat(paper("f30k", "swinb", 224, "finetune"))


def f30k_swinb_224_align() -> TrainConfig:
    return paper("f30k", "swinb", 224, "align")


def f30k_swinb_384_pretrain() -> TrainConfig:
    return paper("f30k", "swinb", 384, "pretrain")


def f30k_swinb_384_pretrain_compat() -> TrainConfig:
    return compat(paper("f30k", "swinb", 384, "pretrain"))


def f30k_swinb_384_finetune() -> TrainConfig:
    return paper("f30k", "swinb", 384, "finetune")


def f30k_swinb_384_finetune_compat() -> TrainConfig:
    return compat(paper("f30k", "swinb", 384, "finetune"))


def f30k_swinb_384_align() -> TrainConfig:
    return paper("f30k", "swinb", 384, "align")
