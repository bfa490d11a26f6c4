"""Networks; blocks come from Diffusers. They are imported when they are asked for."""

import importlib
from typing import TYPE_CHECKING, Any

# what pipelines denoise with and recipes name, and the file of each
NETWORKS = {"AtlasUNet2DModel": "unet_atlas", "AtlasTransformer2DModel": "transformer_atlas"}
_OTHERS = {"AtlasAutoencoder": "autoencoder_atlas"}
_ORIGINALS = ("HighResLatentScoreModel", "build_highres_score_model")  # where users of the original toolkit look for them
MODELS = {**NETWORKS, **_OTHERS}
__all__ = [*MODELS, *_ORIGINALS]

if TYPE_CHECKING:  # for editors and type checkers
    from .autoencoder_atlas import AtlasAutoencoder as AtlasAutoencoder
    from .transformer_atlas import AtlasTransformer2DModel as AtlasTransformer2DModel
    from .unet_atlas import AtlasUNet2DModel as AtlasUNet2DModel


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f".{MODELS[name]}" if name in MODELS else "..originals"
    return getattr(importlib.import_module(module, __name__), name)
