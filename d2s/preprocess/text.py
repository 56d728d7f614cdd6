"""Turns batches of captions into token ids, with the tokenizer's Rust core and numpy.

Words in a caption that look like special tokens ("[MASK]", "</s>") are treated as ordinary words.
"""

import json
import os
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from d2s.shards.order import draws

I64 = NDArray[np.int64]
_MASKED, _REPLACED = 0.5, 0.1
"""Fractions of the augmented words that become [MASK] or random tokens; the others are deleted."""


class TextPipeline:
    """Tokenises, augments, truncates and pads captions. Works on a copy of the tokenizer; can be pickled.

    Args:
        tokenizer: a fast Hugging Face tokenizer (PreTrainedTokenizerFast).
        max_length: default maximum number of tokens in a caption, including special tokens.
    Attributes:
        truncated: number of captions truncated so far in this process.
        pad_id: token id that pads short captions.
    Raises:
        ValueError: `tokenizer` is not fast, or `max_length` leaves no room for words.
    """

    def __init__(self, tokenizer: Any, max_length: int = 64) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"tokenizer is {type(tokenizer).__name__}, which has no fast core: use a PreTrainedTokenizerFast"
            )
        # Each loader process has one core, and the tokenizer's threads can deadlock in a forked process.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._core = Tokenizer.from_str(backend.to_str())
        self._core.no_padding()
        self._core.no_truncation()
        self._prefix, self._suffix = _special_tokens(self._core)
        if max_length <= len(self._prefix) + len(self._suffix):
            raise ValueError(f"max_length is {max_length}: leave room for words beside the special tokens")
        self.max_length = max_length
        self.truncated = 0
        unk = tokenizer.unk_token_id
        special = sorted({i for i in tokenizer.all_special_ids if i is not None})
        fallback = unk if unk is not None else (special[0] if special else 0)
        self._unk_id = fallback
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else fallback
        # Most byte-level tokenizers have no mask token. Then the unknown token replaces it.
        self._mask_id = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else fallback
        self._continuing = _continuing_pieces(self._core)
        added = {
            number: token.content
            for number, token in self._core.get_added_tokens_decoder().items()
            if token.special
        }
        self._special = np.array(sorted({*special, *added}), np.int64)
        contents = sorted({*added.values(), *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        self._special_words = re.compile("|".join(map(re.escape, contents)) or "(?!)", re.IGNORECASE)
        self._pieces = np.setdiff1d(np.arange(self._core.get_vocab_size(with_added_tokens=False)), special)

    def encode(
        self, texts: Sequence[str], max_length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenises captions without augmentation.

        Returns:
            ids, int64 (B, L), padded to the longest caption; mask, bool (B, L), True at real tokens.
        """
        _, ids, lengths = self._encodings(texts)
        return self._pack(ids, lengths, max_length)

    def augment(
        self,
        texts: Sequence[str],
        seed: int,
        epoch: int,
        samples: Sequence[int] | I64,
        *,
        word_augment: float = 0.2,
        max_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenises captions and masks, replaces or deletes words at random.

        Each word is augmented with probability `word_augment`. Of the augmented words, half have all their
        tokens masked, a tenth have all their tokens replaced by random tokens, and the others are deleted. If
        all words of a caption would be deleted, its first word stays unchanged.

        Args:
            samples: (B,), the number of each caption. Random draws depend only on it, `seed` and `epoch`.
        Returns:
            The same as `encode`.
        """
        if word_augment == 0:
            return self.encode(texts, max_length)
        ids, lengths, begins = self._tokens(texts)
        if not ids.size:
            return self._pack(ids, lengths, max_length)
        samples = np.asarray(samples, np.int64)
        row = np.repeat(np.arange(len(texts)), lengths)
        position = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        word = np.cumsum(begins) - 1
        word_row = row[begins]
        word_number = np.arange(len(word_row)) - np.searchsorted(word_row, word_row)
        draw = draws.uniform_at(seed, epoch, samples[word_row], "words", word_number) / word_augment
        deleted = (draw >= _MASKED + _REPLACED) & (draw < 1)
        words_left = np.bincount(word_row[~deleted], minlength=len(texts))
        kept_first = (word_number == 0) & (words_left[word_row] == 0)
        draw = np.where(kept_first, 1.0, draw)[word]

        replaced = np.flatnonzero((draw >= _MASKED) & (draw < _MASKED + _REPLACED))
        ids = np.where(draw < _MASKED, self._mask_id, ids)
        pick = draws.bits_at(seed, epoch, samples[row[replaced]], "pieces", position[replaced])
        ids[replaced] = self._pieces[(pick % np.uint64(len(self._pieces))).astype(np.int64)]
        keep = (draw < _MASKED + _REPLACED) | (draw >= 1)
        return self._pack(ids[keep], np.bincount(row[keep], minlength=len(texts)), max_length)

    def _tokens(self, texts: Sequence[str]) -> tuple[I64, I64, NDArray[np.bool_]]:
        """Returns joined token ids (T,), caption lengths (B,), and whether each token begins a word (T,)."""
        if self._continuing is not None:
            _, ids, lengths = self._encodings(texts)
            return ids, lengths, ~self._continuing[ids]
        encodings, ids, lengths = self._encodings(texts, word_numbers=True)
        numbers, _ = _flat([[-2 if w is None else w for w in e.word_ids] for e in encodings])
        begins = np.diff(numbers, prepend=-1) != 0
        begins[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        return ids, lengths, begins

    def _encodings(
        self, texts: Sequence[str], *, word_numbers: bool = False
    ) -> tuple[list[Encoding], I64, I64]:
        """Returns encodings of captions without special tokens, their joined ids (T,), and lengths (B,)."""
        self._core.encode_special_tokens = True  # as ordinary text; pickling loses this setting
        # encode_batch_fast takes a quarter less time, but does not number the words.
        encode = self._core.encode_batch if word_numbers else self._core.encode_batch_fast
        encodings = encode(list(texts), add_special_tokens=False)
        ids, lengths = _flat([encoding.ids for encoding in encodings])
        special = np.isin(ids, self._special)
        if not special.any():
            return encodings, ids, lengths
        # Some vocabularies have special tokens among their words. A space inside such a word makes it text.
        for row in np.unique(np.repeat(np.arange(len(texts)), lengths)[special]):
            text = self._special_words.sub(lambda word: f"{word[0][0]} {word[0][1:]}", texts[row])
            if text != texts[row]:
                encodings[row] = encode([text], add_special_tokens=False)[0]
        return encodings, *_flat([encoding.ids for encoding in encodings])

    def _pack(self, ids: I64, lengths: I64, max_length: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Truncates and pads joined ids (T,) of captions with lengths (B,). Returns the same as `encode`."""
        before, after = len(self._prefix), len(self._suffix)
        room = (max_length or self.max_length) - before - after
        if before + after == 0 and (lengths == 0).any():  # each caption needs at least one token
            ids = np.insert(ids, (np.cumsum(lengths) - lengths)[lengths == 0], self._unk_id)
            lengths = np.maximum(lengths, 1)
        self.truncated += int((lengths > room).sum())
        position = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        row = np.repeat(np.arange(len(lengths)), lengths)
        inside = position < room
        lengths = np.minimum(lengths, room)
        width = int(lengths.max(initial=0)) + before + after
        out = np.full((len(lengths), width), self.pad_id, np.int64)
        out[:, :before] = self._prefix
        out[row[inside], position[inside] + before] = ids[inside]
        for number, token in enumerate(self._suffix):
            out[np.arange(len(lengths)), before + lengths + number] = token
        mask = np.arange(width) < (lengths + before + after)[:, None]
        return torch.from_numpy(out), torch.from_numpy(mask)


def _flat(lists: list[list[int]]) -> tuple[I64, I64]:
    """Joins B lists of numbers. Returns all T numbers (T,), and the length of each list (B,), both int64."""
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(chain.from_iterable(lists), np.int64, int(lengths.sum())), lengths


def _continuing_pieces(core: Tokenizer) -> NDArray[np.bool_] | None:
    """Returns bool (vocabulary size,): whether each token continues a word. None if it is no BERT tokenizer.

    In BERT tokenizers only continuing tokens start with "##", because "#" in a text is a word of its own.
    """
    description = json.loads(core.to_str())
    model, splitter = description["model"], description["pre_tokenizer"] or {}
    if model["type"] != "WordPiece" or splitter.get("type") != "BertPreTokenizer":
        return None
    continues = np.zeros(core.get_vocab_size(), bool)
    for piece, number in core.get_vocab(with_added_tokens=False).items():
        continues[number] = piece.startswith(model["continuing_subword_prefix"])
    return continues


def _special_tokens(core: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns two lists of token ids: those that the tokenizer adds before a text, and those after it."""
    bare = core.encode("a", add_special_tokens=False).ids
    full = core.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise ValueError("tokenizer changes a text when it adds special tokens: use one that puts them around it")
