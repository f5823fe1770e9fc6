"""The name by which exported models import their classes; it stays wherever the code goes."""

from train.draw.diffusers import NanoDiTPipeline, NanoDiTTransformer

__all__ = ["NanoDiTPipeline", "NanoDiTTransformer"]
