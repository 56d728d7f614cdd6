import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_made import CORPUS, wordpiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from d2s.preprocess.text import TextPipeline
from d2s.shards.order import draws


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", unk_token="<|end|>")


def rows(pair):
    ids, mask = pair
    return [row[m].tolist() for row, m in zip(ids, mask, strict=True)]


def test_encode_is_the_tokenizer_s_own():
    tokenizer = wordpiece()
    wanted = TextPipeline(tokenizer, 64)._core.encode_batch(CORPUS)
    ids, mask = TextPipeline(tokenizer, 64).encode(CORPUS)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert rows((ids, mask)) == [encoding.ids for encoding in wanted]
    assert ids.shape[1] == max(len(encoding.ids) for encoding in wanted)
    assert (ids[~mask] == tokenizer.pad_token_id).all()
    assert tokenizer.backend_tokenizer.padding is not None  # the user's tokenizer is as it was


def test_long_captions_are_cut_and_counted():
    pipeline = TextPipeline(wordpiece(), 6)
    found = rows(pipeline.encode([CORPUS[0], "a dog"]))
    assert len(found[0]) == 6
    assert (found[0][0], found[0][-1]) == (2, 3)
    assert pipeline.truncated == 1
    pipeline.encode([CORPUS[0]], max_length=64)
    assert pipeline.truncated == 1


def plain_augment(pipeline, text, seed, epoch, sample, p):
    """The documented augmentation, word by word."""
    encoding = pipeline._core.encode(text, add_special_tokens=False)
    words = sorted(set(encoding.word_ids))
    chance = draws.uniform(seed, epoch, [sample], "words", max(1, len(words)))[0] / p
    if words and all(0.6 <= c < 1 for c in chance[: len(words)]):
        chance[0] = 1.0
    out = []
    for position, (token, word) in enumerate(zip(encoding.ids, encoding.word_ids, strict=True)):
        c = chance[words.index(word)]
        if c < 0.5:
            out.append(pipeline._mask_id)
        elif c < 0.6:
            pick = int(draws.bits_at(seed, epoch, [sample], "pieces", [position])[0])
            out.append(int(pipeline._pieces[pick % len(pipeline._pieces)]))
        elif c >= 1:
            out.append(token)
    return out


PIPELINE = TextPipeline(wordpiece(), 64)
TEXTS = st.lists(
    st.one_of(st.sampled_from([*CORPUS, "", "##s ##"]), st.text(max_size=20)), min_size=1, max_size=9
)


@given(TEXTS, st.integers(0, 10**6), st.sampled_from([0.2, 0.7, 1.0]))
@settings(max_examples=100, deadline=None)
def test_augment_equals_the_plain_loop(texts, seed, p):
    pipeline = PIPELINE
    samples = [seed * 3 + 7 * i for i in range(len(texts))]
    found = rows(pipeline.augment(texts, seed, 2, samples, word_augment=p))
    wanted = [plain_augment(pipeline, t, seed, 2, s, p) for t, s in zip(texts, samples, strict=True)]
    assert found == [[2, *row, 3] for row in wanted]
    # Each caption alone gives the same: nothing depends on its neighbours.
    alone = [pipeline.augment([t], seed, 2, [i], word_augment=p) for t, i in zip(texts, samples, strict=True)]
    assert [rows(pair)[0] for pair in alone] == found


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_words_told_by_pieces_are_the_tokenizer_s_words(texts):
    slow = pickle.loads(pickle.dumps(PIPELINE))
    assert slow._continuing is not None
    slow._continuing = None
    for fast, general in zip(PIPELINE._tokens(texts), slow._tokens(texts), strict=True):
        assert (fast == general).all()


def test_a_byte_level_tokenizer_s_words_are_touched_whole():
    pipeline = TextPipeline(byte_level(), 64)
    assert pipeline._continuing is None
    pieces = pipeline._core.encode(CORPUS[1], add_special_tokens=False)
    assert len(set(pieces.word_ids)) < len(pieces.ids)  # some words have several pieces
    found = rows(pipeline.augment([CORPUS[1]] * 100, 5, 2, range(100), word_augment=0.7))
    assert found == [plain_augment(pipeline, CORPUS[1], 5, 2, sample, 0.7) for sample in range(100)]


def test_shares_of_mask_random_and_deletion():
    words = 8
    text = " ".join(["dog"] * words)  # one piece
    dog = PIPELINE.encode(["dog"])[0][0, 1].item()
    n = 4000
    found = rows(PIPELINE.augment([text] * n, 0, 0, np.arange(n)))
    flat = np.array([token for row in found for token in row[1:-1]])
    total = n * words
    masked, kept = (flat == 4).sum() / total, (flat == dog).sum() / total
    deleted = 1 - len(flat) / total
    assert masked == pytest.approx(0.10, abs=0.01)
    assert deleted == pytest.approx(0.08, abs=0.01)
    assert kept == pytest.approx(0.80, abs=0.012)
    random = flat[(flat != 4) & (flat != dog)]
    assert len(random) / total == pytest.approx(0.02, abs=0.005)
    assert random.min() > 4  # never a special token
    assert len(np.unique(random)) > 30


def test_never_empty():
    for sample in range(300):
        row = rows(PIPELINE.augment(["dog sand"], 0, 0, [sample], word_augment=1.0))[0]
        assert len(row) > 2


def test_no_augmentation_is_encode_and_epochs_differ():
    texts = CORPUS * 20
    assert rows(PIPELINE.augment(texts, 0, 0, range(60), word_augment=0)) == rows(PIPELINE.encode(texts))
    assert rows(PIPELINE.augment(texts, 0, 0, range(60))) != rows(PIPELINE.augment(texts, 0, 1, range(60)))


def test_tokenizers_without_mask_or_special_tokens():
    pipeline = TextPipeline(byte_level(), 32)
    ids, mask = pipeline.augment([*CORPUS, ""], 0, 0, range(4), word_augment=1.0)
    assert mask.any(1).all()
    assert ids.shape == mask.shape
    assert rows(pipeline.encode(["a dog"])) == [pipeline._core.encode("a dog").ids]
    bare = TextPipeline(wordpiece(post=False, mask=None), 32)
    assert (bare.augment(["dog"] * 50, 0, 0, range(50), word_augment=1.0)[0] == 1).any()  # [UNK] masks


def test_pickled():
    again = pickle.loads(pickle.dumps(PIPELINE))
    assert rows(again.augment(CORPUS, 0, 0, range(3))) == rows(PIPELINE.augment(CORPUS, 0, 0, range(3)))


def test_mistakes():
    with pytest.raises(ValueError, match="tokenizer is object"):
        TextPipeline(object(), 64)
    with pytest.raises(ValueError, match="max_length is 2"):
        TextPipeline(wordpiece(), 2)
