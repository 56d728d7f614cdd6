"""Words of a caption that look like special tokens stay words, whatever the tokenizer."""

import pickle

import numpy as np
import pytest
import torch
from model_towers import CAPTIONS, tiny_model
from tokenizer_made import CORPUS, wordpiece
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from d2s.model import build_word_tokenizer
from d2s.model.tokenizer import read_tokenizer
from d2s.preprocess.text import TextPipeline

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "<|endoftext|>"]
MODELS = {
    "unigram": (
        models.Unigram(), pre_tokenizers.Metaspace(),
        trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>"),
    ),
    "words": (
        models.WordLevel(unk_token="<unk>"), pre_tokenizers.WhitespaceSplit(),
        trainers.WordLevelTrainer(special_tokens=SPECIAL),
    ),
    "bytes": (
        models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False),
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    ),
}  # fmt: skip


def tokenizer(name):
    if name == "wordpiece":
        return wordpiece()
    if name == "built":
        return build_word_tokenizer([*CORPUS, "[ ] < / > | mask sep pad cls unk s endoftext"])
    model, splitter, trainer = MODELS[name]
    core = Tokenizer(model)
    core.pre_tokenizer = splitter
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, mask_token="<mask>", extra_special_tokens=["<|endoftext|>"], **names
    )


KINDS = ["wordpiece", "built", *MODELS]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


def ids(pair):
    return [row[mask].tolist() for row, mask in zip(*pair, strict=True)]


def test_special_words_stay_text(kind):
    plain = tokenizer(kind)
    pipeline = pickle.loads(pickle.dumps(TextPipeline(plain, 64)))  # as a loader process gets it
    special = set(plain.all_special_ids) - {plain.unk_token_id}
    words = [word for word in plain.all_special_tokens if word != plain.unk_token]
    texts = [form.format(word) for word in words for form in ("{}", "a {} dog", "dog{}", "{0}{0} the dog")]
    for found in (
        pipeline.encode(texts),
        pipeline.augment(texts, 0, 0, range(len(texts)), word_augment=1e-9),
    ):
        for text, row in zip(texts, ids(found), strict=True):
            assert special.isdisjoint(row[1:-1]), text
            assert len(row) > 2, text


def test_ordinary_captions_keep_their_ids(kind):
    texts = [*CORPUS, "a dog, a cat & 1 zebra", "mask sep [ ] < s > pad", "", "xyz"]
    plain = tokenizer(kind)
    assert ids(TextPipeline(plain, 64).encode(texts)) == [plain(text)["input_ids"] for text in texts]


def test_augmentation_still_masks(kind):
    plain = tokenizer(kind)
    rows = ids(TextPipeline(plain, 64).augment([CORPUS[0]] * 50, 0, 0, np.arange(50), word_augment=1.0))
    assert sum(row.count(plain.mask_token_id) for row in rows) > 50


def test_encode_text_and_the_model_s_tokenizer_read_text(tmp_path):
    model = tiny_model()
    words = ["a [PAD] [SEP] dog", "a [MASK] cat"]
    assert {0, 3, 4}.isdisjoint(model.tokenizer(words[0])["input_ids"][1:-1])
    spaced = ["a [ PAD ] [ SEP ] dog", "a [ MASK ] cat"]
    assert torch.equal(model.encode_text(words), model.encode_text(spaced))
    model.tokenizer.save_pretrained(tmp_path)
    again = read_tokenizer(tmp_path, "tokenizer")
    assert again(words)["input_ids"] == model.tokenizer(words)["input_ids"]


def test_encode_text_embeds_the_pieces_of_the_tokenizer():
    model = tiny_model()
    with torch.no_grad():
        coded = model.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
        out = model.forward_text(coded["input_ids"], coded["attention_mask"].bool()).embedding
    torch.testing.assert_close(model.encode_text(CAPTIONS), torch.nn.functional.normalize(out, dim=1))


def test_encode_text_follows_a_new_tokenizer():
    model = tiny_model()
    before = model.encode_text("the dog")
    model.tokenizer = build_word_tokenizer(["dog the a b"], min_count=1)
    assert not torch.equal(model.encode_text("the dog"), before)
