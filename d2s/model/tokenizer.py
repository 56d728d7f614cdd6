"""Loads the tokenizer that belongs to a text tower, or builds a word tokenizer from captions."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from d2s.model.config import TowerConfig
from d2s.model.hub import quiet, reachable, reason

WORDS = "words"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def build_word_tokenizer(
    captions: Iterable[str], *, min_count: int = 2, max_words: int = 30_000
) -> BertTokenizer:
    """Builds a lower-case word tokenizer for text towers with random weights, the same for equal captions.

    Words that occur at least `min_count` times become one token each, but only the `max_words` most frequent.
    Other words are split into the longest tokens that fit, down to single characters (with ## inside a word).
    A word with a character that occurs in no caption becomes [UNK].
    Raises ValueError if no caption has a word.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    if not counts:
        raise ValueError("captions=[]: no words to build a tokenizer from, give it the training captions")
    characters = sorted({character for word in counts for character in word})
    frequent = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters), *frequent[:max_words]]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocabulary, split_special_tokens=True)


def load_tokenizer(tower: TowerConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that `tower` names. Raises ValueError if there is no name or loading fails."""
    name = tower.tokenizer or tower.name
    if name is None or name == WORDS:
        raise ValueError(
            f"text_encoder.tokenizer={tower.tokenizer!r}: hand D2SModel a tokenizer, for instance "
            "build_word_tokenizer(captions), or name one"
        )
    return read_tokenizer(reachable(name), f"text_encoder.tokenizer={name!r}")


def read_tokenizer(path: str | Path, what: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder, or by its name from the Hugging Face hub.

    Raises ValueError, in one line that begins with `what`, if there is no tokenizer or its files are damaged.
    """
    try:
        with quiet():
            # The text "[MASK]" in a caption must not become a special token.
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=False, split_special_tokens=True
            )
    except Exception as error:
        known = (OSError, ValueError, LookupError, TypeError, AttributeError)
        # The tokenizers library raises the class Exception itself.
        if type(error) is not Exception and not isinstance(error, known):
            raise
        raise ValueError(f"{what}: no tokenizer, {type(error).__name__}: {reason(error, path)}") from error
    if tokenizer.pad_token_id is None:
        # Batches of texts need a padding token; the mask excludes padding from every result.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
