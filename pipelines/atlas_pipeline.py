"""Load an AtlasPipeline folder in a program that does not import atlas_diffusers itself:

    DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipelines/atlas_pipeline.py", trust_remote_code=True)
"""

from atlas_diffusers import AtlasPipeline

__all__ = ["AtlasPipeline"]
