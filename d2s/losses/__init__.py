"""The objective: alignment of images with captions, and distillation."""
