"""The word tokenizer for towers without pretrained weights."""

import pytest
from model_towers import CAPTIONS

from d2s.model import build_word_tokenizer


def test_same_captions_same_tokenizer():
    one, other = build_word_tokenizer(CAPTIONS), build_word_tokenizer(list(reversed(CAPTIONS)))
    assert one.get_vocab() == other.get_vocab()
    assert one.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert one.pad_token_id == 0
    assert one.mask_token == "[MASK]"


def test_frequent_words_are_one_piece_and_others_are_spelt():
    tokenizer = build_word_tokenizer(CAPTIONS, min_count=2)
    assert tokenizer.tokenize("The DOG") == ["the", "dog"]
    assert tokenizer.tokenize("dogs") == ["dog", "##s"]
    assert tokenizer.tokenize("men") == ["m", "##e", "##n"]
    assert tokenizer.tokenize("d\u00f3g") == ["dog"]
    assert tokenizer.tokenize("q") == ["[UNK]"]
    ids = tokenizer("the dog")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "the", "dog", "[SEP]"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the dog"


def test_number_of_words_is_limited():
    tokenizer = build_word_tokenizer(["b b a a a c c"], max_words=1, min_count=1)
    assert "aa" not in tokenizer.get_vocab()
    assert len(build_word_tokenizer(["bb bb aa aa aa cc"], max_words=1, min_count=1)) == 5 + 6 + 1


def test_no_words_is_an_error():
    with pytest.raises(ValueError, match="captions"):
        build_word_tokenizer(["", " "])
