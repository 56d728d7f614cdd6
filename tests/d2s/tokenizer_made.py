"""A small fast tokenizer, trained on three sentences."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["a brown dog runs on the sand", "two children, one ball; unbelievable!", "the dogs are running"]


def wordpiece(post=True, mask="[MASK]"):
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *([mask] if mask else [])]
    core.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if post:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    if mask:
        names["mask_token"] = mask
    core.enable_padding(length=128)  # as published tokenizers have it: must not matter
    core.enable_truncation(5)
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)
