"""Networks; blocks come from Diffusers."""

from .unet_atlas import AtlasUNet2DModel

__all__ = ["AtlasUNet2DModel"]
