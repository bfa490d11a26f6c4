"""Samples larger than the network was trained on, part by part."""

from collections.abc import Callable

import torch


class Tiles:
    r"""
    Overlapping squares of a sample whose predictions are blended with Hann windows w:

        m(p) = Σ_k w_k(p) m_k(p) / Σ_k w_k(p)

    (Bar-Tal et al. 2023, arXiv 2302.08113). Where all tiles agree, so does the blend.

    Args:
        size: side of a tile, in (latent) pixels.
        overlap: what neighbours share at least, in the same unit.

    Raises:
        ValueError: for an overlap that is not in [0, size).
    """

    def __init__(self, size: int, overlap: int):
        if not 0 <= overlap < size:
            raise ValueError(f"tile_overlap={overlap} must be at least 0 and below tile_size={size}")
        self.size, self.overlap = size, overlap

    def starts(self, length: int) -> list[int]:
        """Where tiles begin along a side, evenly spread from 0 to ``length - size``."""
        last = length - self.size
        if last <= 0:
            return [0]
        count = -(-last // (self.size - self.overlap))
        return [round(last * k / count) for k in range(count + 1)]

    def blend(self, predict: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """The blended prediction for ``x`` (batch, channels, height, width)."""
        height, width = (min(self.size, side) for side in x.shape[-2:])
        window = _hann(height, x)[:, None] * _hann(width, x)
        total, weights = 0, torch.zeros(x.shape[-2:], device=x.device)
        for top in self.starts(x.shape[-2]):
            for left in self.starts(x.shape[-1]):
                place = (..., slice(top, top + height), slice(left, left + width))
                found = predict(x[place])
                if not torch.is_tensor(total):
                    total = torch.zeros(*found.shape[:2], *x.shape[-2:], device=x.device)
                total[place] += window * found
                weights[place] += window
        return (total / weights).to(x.dtype)


def _hann(length: int, like: torch.Tensor) -> torch.Tensor:
    """sin², sampled at the middles of pixels, where it is nowhere 0."""
    return torch.sin(torch.pi * (torch.arange(length, device=like.device) + 0.5) / length) ** 2
