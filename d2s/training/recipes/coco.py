"""COCO recipes with the paper's settings. :mod:`d2s.training.recipes` explains the names."""

from functools import partial

from d2s.training.recipes.paper import compat, paper

coco_vitb16_224_pretrain = partial(paper, "vitb16", 224, "pretrain")
coco_vitb16_224_pretrain_compat = partial(compat, "vitb16", 224, "pretrain")
coco_vitb16_224_finetune = partial(paper, "vitb16", 224, "finetune")
coco_vitb16_224_finetune_compat = partial(compat, "vitb16", 224, "finetune")
coco_vitb16_224_align = partial(paper, "vitb16", 224, "align")

coco_vitb16_384_pretrain = partial(paper, "vitb16", 384, "pretrain")
coco_vitb16_384_pretrain_compat = partial(compat, "vitb16", 384, "pretrain")
coco_vitb16_384_finetune = partial(paper, "vitb16", 384, "finetune")
coco_vitb16_384_finetune_compat = partial(compat, "vitb16", 384, "finetune")
coco_vitb16_384_align = partial(paper, "vitb16", 384, "align")

coco_vitb16_480_pretrain = partial(paper, "vitb16", 480, "pretrain")
coco_vitb16_480_pretrain_compat = partial(compat, "vitb16", 480, "pretrain")
coco_vitb16_480_finetune = partial(paper, "vitb16", 480, "finetune")
coco_vitb16_480_finetune_compat = partial(compat, "vitb16", 480, "finetune")
coco_vitb16_480_align = partial(paper, "vitb16", 480, "align")

coco_swinb_224_pretrain = partial(paper, "swinb", 224, "pretrain")
coco_swinb_224_pretrain_compat = partial(compat, "swinb", 224, "pretrain")
coco_swinb_224_finetune = partial(paper, "swinb", 224, "finetune")
coco_swinb_224_finetune_compat = partial(compat, "swinb", 224, "finetune")
coco_swinb_224_align = partial(paper, "swinb", 224, "align")

coco_swinb_384_pretrain = partial(paper, "swinb", 384, "pretrain")
coco_swinb_384_pretrain_compat = partial(compat, "swinb", 384, "pretrain")
coco_swinb_384_finetune = partial(paper, "swinb", 384, "finetune")
coco_swinb_384_finetune_compat = partial(compat, "swinb", 384, "finetune")
coco_swinb_384_align = partial(paper, "swinb", 384, "align")
