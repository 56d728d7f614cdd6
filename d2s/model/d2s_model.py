"""Defines `D2SModel`. Training calls its `forward` methods with tensors. Users call its `encode` methods."""

import dataclasses
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from d2s.model import saving
from d2s.model.config import IdleSetting, ModelConfig, idle_settings
from d2s.model.decoder import Decoder
from d2s.model.image_encoder import ImageEncoder
from d2s.model.text_encoder import TextEncoder
from d2s.model.tokenizer import load_tokenizer, read_tokenizer
from d2s.model.weight_names import TOWERS
from d2s.preprocess.pixels import Picture, pixels
from d2s.preprocess.text import TextPipeline


class TextOutput(NamedTuple):
    """Holds the embeddings of B texts. B is the batch size, and D is the model's width."""

    embedding: Tensor
    """Shape (B, D): t + p, or t if there is no decoder. The rows are not scaled to length 1."""
    text: Tensor
    """Shape (B, D): the text embedding t."""
    prompt: Tensor | None
    """Shape (B, D): the decoder's prompt p. None if there is no decoder."""


class D2SModel(nn.Module):
    """Embeds images and texts in one space. Source: Liu et al., ICCV 2025 (D2S-VSE), arXiv 2503.14953.

    `tokenizer` is required if the text tower has neither name nor tokenizer, or has the tokenizer "words".
    Raises ValueError if a tower cannot be built. Warns with `IdleSetting` about settings without effect.
    """

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__()
        for line in idle_settings(config):
            warnings.warn(line, IdleSetting, stacklevel=2)
        self.config = config
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.text_encoder)
        self._pipeline: tuple[PreTrainedTokenizerBase, TextPipeline] | None = None
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config, len(self.tokenizer))
        vocabulary = self.text_encoder.tower.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > vocabulary:
            raise ValueError(
                f"text_encoder: its tokenizer has {len(self.tokenizer)} pieces and the tower knows {vocabulary}, "
                "name the tokenizer that belongs to it"
            )
        self.decoder: Decoder | None = None
        if config.decoder is not None:
            self.decoder = Decoder(config.decoder, config.width, config.compat_decoder_padding)

    @property
    def device(self) -> torch.device:
        """Returns the device that holds the weights."""
        return self.image_encoder.linear.weight.device

    @property
    def max_words(self) -> int:
        """Returns the setting `max_words`, or the text tower's limit of word pieces if that is smaller."""
        positions = getattr(self.text_encoder.tower.config, "max_position_embeddings", None)
        return min(self.config.max_words, positions or self.config.max_words)

    def forward_image(self, images: Tensor, draw_seeds: Tensor | None = None) -> Tensor:
        """Embeds images. Arguments and result are explained in `ImageEncoder.forward`."""
        return self.image_encoder(images, draw_seeds)

    def forward_text(self, ids: Tensor, mask: Tensor, *, draw_seeds: Tensor | None = None) -> TextOutput:
        """Embeds B texts of up to L word pieces.

        ids: numbers of word pieces, int64, of shape (B, L). mask: boolean, of shape (B, L), false at padding.
        draw_seeds: see `TextEncoder.forward`.
        """
        text, words = self.text_encoder(ids, mask, draw_seeds)
        if self.decoder is None:
            return TextOutput(text, text, None)
        prompt = self.decoder(words, mask)
        unit_prompt = self.config.compat_unit_prompt and not self.training
        added = prompt / (prompt.norm(dim=1, keepdim=True) + 1e-8) if unit_prompt else prompt
        return TextOutput(text + added, text, prompt)

    def forward(
        self, images: Tensor, ids: Tensor, mask: Tensor, draw_seeds: Tensor | None = None
    ) -> tuple[Tensor, TextOutput]:
        """Returns the results of `forward_image` and `forward_text`. Only images use `draw_seeds`."""
        return self.forward_image(images, draw_seeds), self.forward_text(ids, mask)

    def tower_parameters(self) -> list[nn.Parameter]:
        """Returns the trained parameters of both towers."""
        return [p for name, p in self.named_parameters() if p.requires_grad and name.startswith(TOWERS)]

    @torch.no_grad()
    def encode_image(
        self, images: Picture | Sequence[Picture], batch_size: int = 32, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Embeds n pictures in eval mode, in the given order.

        Returns float32 embeddings of shape (n, D) on `device`, each scaled to length 1.
        A picture is a PIL image, a path, the bytes of an image file, or a uint8 array of shape (H, W) or
        (H, W, 3). `batch_size` changes only the speed.
        Raises ValueError if `batch_size` is not a positive integer, or if a picture is unreadable. In
        the second case, the message contains the path or the position of the picture.
        """
        _check_batch_size(batch_size)
        if not isinstance(images, (list, tuple)):
            images = [images]
        parts = []
        with evaluating(self):
            for start in range(0, len(images), batch_size):
                batch = [
                    pixels(images[number], self.config.image_size, f"images[{number}]")
                    for number in range(start, min(start + batch_size, len(images)))
                ]
                parts.append(self.forward_image(torch.stack(batch).to(self.device)).float())
        return torch.cat(parts).to(device) if parts else torch.zeros(0, self.config.width, device=device)

    @property
    def _text_pipeline(self) -> TextPipeline:
        """Returns the text pipeline. It is built once for a tokenizer, because it copies the vocabulary."""
        if self._pipeline is None or self._pipeline[0] is not self.tokenizer:
            self._pipeline = self.tokenizer, TextPipeline(self.tokenizer, self.max_words)
        return self._pipeline[1]

    @torch.no_grad()
    def encode_text(
        self, texts: str | Sequence[str], batch_size: int = 128, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Embeds n texts in eval mode, in the given order.

        Returns float32 embeddings of shape (n, D) on `device`, each scaled to length 1. With a decoder, they
        are t + p (see `TextOutput`), which training aligns with images. Texts are cut after `max_words` word
        pieces. `batch_size` changes only the speed.
        Raises ValueError if `texts` is a dictionary or a set, or if `batch_size` is not a positive integer.
        Raises ValueError, with an item's position, if the item is no string or cannot be encoded in UTF-8.
        """
        _check_batch_size(batch_size)
        texts = _text_list(texts)
        out = torch.zeros(len(texts), self.config.width)
        # Sorting by length puts texts of similar length in one batch, which then needs less padding.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        pipeline = self._text_pipeline
        with evaluating(self):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                ids, mask = pipeline.encode([texts[row] for row in rows])
                embedding = self.forward_text(ids.to(self.device), mask.to(self.device)).embedding
                out[rows] = nn.functional.normalize(embedding.float(), dim=1).cpu()
        return out.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors, config.json and the tokenizer. Creates `folder` if it is missing."""
        saving.write(Path(folder), self.config, self.tokenizer, self)

    @classmethod
    def from_pretrained(cls, name: str | Path, **changes: object) -> Self:
        """Loads a saved model, in eval mode. `name` is a folder or a name on the hub.

        `changes` replace fields of the saved `ModelConfig`. An added decoder starts with random weights. A
        changed `image_size` resizes the position embeddings.
        Raises ValueError, with a message of one line, if there is no such model or a file is damaged.
        """
        folder = saving.find_folder(name)
        config = dataclasses.replace(saving.read_config(folder), **changes)
        tokenizer = read_tokenizer(folder, f"model {str(folder)!r}")
        with warnings.catch_warnings():
            # The warning that weights are random would be wrong, because `load_weights` loads them below.
            warnings.simplefilter("ignore", IdleSetting)
            model = cls(config, tokenizer)
        for line in idle_settings(config, changes.keys()):
            warnings.warn(line, IdleSetting, stacklevel=2)
        saving.load_weights(model, folder)
        return model.eval()

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the saved model to the hub. Returns its address. See `HfApi` for `private` and `token`."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return str(address)


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: give a whole number of at least 1")


def _text_list(texts: str | Iterable[str]) -> list[str]:
    """Returns the texts as a list. Raises ValueError for invalid texts, as `encode_text` explains."""
    if isinstance(texts, (Mapping, set, frozenset)) or not isinstance(texts, Iterable):
        raise ValueError(f"texts is a {type(texts).__name__}: give a text or a list of texts")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{number}] is a {type(text).__name__}: give strings")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"texts[{number}] has half of a surrogate pair at character {error.start}: take it out"
            ) from None
    return texts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode for a `with` block. Restores the previous mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
