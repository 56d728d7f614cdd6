"""Contains the model of D2S-VSE: an image tower, a text tower, generalised pooling, and a decoder."""

from d2s.model.config import DecoderConfig, IdleSetting, ModelConfig, TowerConfig
from d2s.model.d2s_model import D2SModel, TextOutput
from d2s.model.teacher import Teacher
from d2s.model.tokenizer import build_word_tokenizer

__all__ = [
    "D2SModel",
    "DecoderConfig",
    "IdleSetting",
    "ModelConfig",
    "Teacher",
    "TextOutput",
    "TowerConfig",
    "build_word_tokenizer",
]
