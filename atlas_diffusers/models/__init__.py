"""Networks; blocks come from Diffusers."""

import importlib

from .autoencoder_atlas import AtlasAutoencoder
from .transformer_atlas import AtlasTransformer2DModel
from .unet_atlas import AtlasUNet2DModel

__all__ = [
    "AtlasAutoencoder",
    "AtlasTransformer2DModel",
    "AtlasUNet2DModel",
    "HighResLatentScoreModel",
    "build_highres_score_model",
]


def __getattr__(name: str):
    if name in __all__:  # where users of the original toolkit look for them
        return getattr(importlib.import_module("..originals", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
