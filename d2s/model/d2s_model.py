"""The model: image tower, text tower, decoder; for tensors in training, pictures and strings in use."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from d2s.model import saving as files
from d2s.model.config import IdleSetting, ModelConfig, idle_settings
from d2s.model.decoder import Decoder
from d2s.model.image_encoder import ImageEncoder
from d2s.model.text_encoder import TextEncoder
from d2s.model.tokenizer import load_tokenizer
from d2s.preprocess.pixels import Picture, pixels


class TextOutput(NamedTuple):
    """What the text side gives for a batch of B texts; D is the model's width."""

    embedding: Tensor
    """(B, D) t + p, or t without the decoder; not of unit length."""
    text: Tensor
    """(B, D) the text embedding t."""
    prompt: Tensor | None
    """(B, D) the decoder's prompt p; None without the decoder."""


class D2SModel(nn.Module):
    """Image and text embeddings in one space. Liu et al., ICCV 2025, arXiv 2503.14953.

    `tokenizer` is needed where the text tower names none (random weights, or tokenizer "words").
    Raises ValueError on a tower that cannot be built, and warns (IdleSetting) of settings without effect.
    """

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__()
        for line in idle_settings(config):
            warnings.warn(line, IdleSetting, stacklevel=2)
        self.config = config
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.text_encoder)
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config, len(self.tokenizer))
        have = self.text_encoder.tower.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > have:
            raise ValueError(
                f"text_encoder: its tokenizer has {len(self.tokenizer)} pieces and the tower knows {have}, "
                "name the tokenizer that belongs to it"
            )
        self.decoder: Decoder | None = None
        if config.decoder is not None:
            self.decoder = Decoder(config.decoder, config.width, config.compat_decoder_padding)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.image_encoder.linear.weight.device

    @property
    def max_words(self) -> int:
        """Longest text in word pieces: the setting, or what the text tower has positions for if less."""
        positions = getattr(self.text_encoder.tower.config, "max_position_embeddings", None)
        return min(self.config.max_words, positions or self.config.max_words)

    def forward_image(self, images: Tensor, draw_seeds: Tensor | None = None) -> Tensor:
        """Embed uint8 images (B, 3, H, W): (B, D) of unit length. For draw_seeds see `ImageEncoder`."""
        return self.image_encoder(images, draw_seeds)

    def forward_text(
        self, ids: Tensor, mask: Tensor, *, decoder: bool | None = None, draw_seeds: Tensor | None = None
    ) -> TextOutput:
        """Embed word pieces ids (B, L) int64 whose real ones are where mask (B, L) bool is true.

        decoder: None uses the decoder if there is one, False leaves it out, True insists on it (ValueError).
        For draw_seeds see `TextEncoder`.
        """
        if decoder and self.decoder is None:
            raise ValueError(
                "decoder=True: this model has no decoder, set model.decoder in its configuration"
            )
        text, words = self.text_encoder(ids, mask, draw_seeds)
        if self.decoder is None or decoder is False:
            return TextOutput(text, text, None)
        prompt = self.decoder(words, mask)
        added = prompt
        if self.config.compat_unit_prompt and not self.training:
            added = prompt / (prompt.norm(dim=1, keepdim=True) + 1e-8)
        return TextOutput(text + added, text, prompt)

    def forward(
        self, images: Tensor, ids: Tensor, mask: Tensor, draw_seeds: Tensor | None = None
    ) -> tuple[Tensor, TextOutput]:
        """`forward_image` and `forward_text` in one call, for engines that wrap a module's forward."""
        return self.forward_image(images, draw_seeds), self.forward_text(ids, mask)

    def parameter_parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters that learn, by part: "backbone" (the two towers) and "head" (everything else)."""
        parts: dict[str, list[tuple[str, nn.Parameter]]] = {"backbone": [], "head": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                tower = name.startswith(("image_encoder.tower.", "text_encoder.tower."))
                parts["backbone" if tower else "head"].append((name, parameter))
        return parts

    @torch.no_grad()
    def encode_image(
        self, images: Picture | Sequence[Picture], batch_size: int = 32, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Embed pictures in eval mode: (n, D) float32 of unit length, in the order given.

        A picture is a PIL image, a path, the bytes of an image file, or a uint8 array (H, W), (H, W, 3).
        batch_size changes the speed only; the result is put on `device`.
        Raises ValueError naming the path of a picture that cannot be read, or its place in the list.
        """
        if not isinstance(images, (list, tuple)):
            images = [images]
        parts = []
        with _evaluating(self):
            for start in range(0, len(images), batch_size):
                batch = [
                    pixels(images[number], self.config.image_size, f"images[{number}]")
                    for number in range(start, min(start + batch_size, len(images)))
                ]
                parts.append(self.forward_image(torch.stack(batch).to(self.device)).float())
        return torch.cat(parts).to(device) if parts else torch.zeros(0, self.config.width, device=device)

    @torch.no_grad()
    def encode_text(
        self, texts: str | Sequence[str], batch_size: int = 128, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Embed texts in eval mode: (n, D) float32 of unit length, in the order given.

        With a decoder this is t + p, the embedding that training aligns. Texts longer than `max_words` word
        pieces are cut. batch_size changes the speed only; the result is put on `device`.
        Raises ValueError naming the place of what is not a string, or not one that UTF-8 can write.
        """
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
        out = torch.zeros(len(texts), self.config.width)
        # Texts of like length share a batch: less padding, the same embeddings.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        with _evaluating(self):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                ids, mask = self._pieces([texts[row] for row in rows])
                embedding = self.forward_text(ids.to(self.device), mask.to(self.device)).embedding
                out[rows] = nn.functional.normalize(embedding.float(), dim=1).cpu()
        return out.to(device)

    def _pieces(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        coded = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_words, return_tensors="pt"
        )
        return coded["input_ids"], coded["attention_mask"].bool()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors, config.json and the tokenizer to `folder`, made if it is missing."""
        files.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, name: str | Path, **changes: object) -> D2SModel:
        """Load a saved model, in eval mode, from a folder or from the hub.

        `changes` replace fields of its `ModelConfig`. A decoder that the saved model lacks starts from random
        weights; another image_size resizes the position embeddings.
        Raises ValueError in one line where there is no such model or the files are not one.
        """
        return files.load(cls, name, changes)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to the hub, and return the address."""
        return files.push(self, repo_id, private=private, token=token)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the old mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
