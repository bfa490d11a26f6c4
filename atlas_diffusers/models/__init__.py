"""Networks; blocks come from Diffusers."""

from .high_res import HighResLatentScoreModel, build_highres_score_model
from .unet_atlas import AtlasUNet2DModel

__all__ = ["AtlasUNet2DModel", "HighResLatentScoreModel", "build_highres_score_model"]
