"""From tensors to PIL pictures."""

import torch
from PIL import Image


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """PIL pictures, RGB or grey, of (n, 3 or 1, height, width) in [-1, 1]."""
    values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in values]
