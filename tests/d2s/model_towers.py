"""Tiny towers with random weights, for the tests of the model."""

import torch

from d2s.model import D2SModel, DecoderConfig, ModelConfig, TowerConfig, build_word_tokenizer, presets

CAPTIONS = [
    "A dog runs on the grass.",
    "Two men play a game of chess in the park while a dog watches them from under the bench",
    "a red bicycle",
    "the dog",
]
VISION = {
    "vit": {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "patch_size": 8,
        "image_size": 48,
    },
    "swin": {
        "model_type": "swin",
        "embed_dim": 8,
        "depths": [2, 1],
        "num_heads": [1, 2],
        "window_size": 4,
        "patch_size": 4,
    },
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 32,
    },
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24],
        "depths": [1, 1, 1],
        "layer_type": "basic",
    },
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
}
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
SIZE = 32


def small_vit(width: int = 128, depth: int = 4) -> TowerConfig:
    """A small ViT with random weights and without dropout."""
    fields = presets.small_bert(width, depth).config
    return TowerConfig(config={**fields, "model_type": "vit", "patch_size": 16}, pretrained=False)


def tiny_config(vision: str = "vit", **changes) -> ModelConfig:
    """A model of a few thousand weights; `changes` replace fields."""
    fields = {
        "width": 16,
        "image_size": SIZE,
        "image_encoder": TowerConfig(config=VISION[vision], pretrained=False),
        "text_encoder": TowerConfig(config=BERT, pretrained=False, tokenizer="words"),
        "decoder": DecoderConfig(tokens=5, depth=2, heads=2),
    }
    return ModelConfig(**{**fields, **changes})


def tiny_model(vision: str = "vit", *, seed: int = 0, **changes) -> D2SModel:
    """A model of `tiny_config`, its statistics and biases moved off their initial values, in eval mode."""
    torch.manual_seed(seed)
    model = D2SModel(tiny_config(vision, **changes), build_word_tokenizer(CAPTIONS, min_count=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return model.eval()


def pictures(count: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    """uint8 (count, 3, size, size) noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def pieces(model: D2SModel, texts: list[str], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask of the texts, padded to the longest or to `length`."""
    padding = {"padding": "max_length", "max_length": length} if length else {"padding": True}
    coded = model.tokenizer(texts, return_tensors="pt", **padding)
    return coded["input_ids"], coded["attention_mask"].bool()
