"""Networks, samplers, inference and conditioning, under the names of the original toolkit."""

from typing import Literal

from pydantic import Field, model_validator

from .training import LoRAConfig, StrictModel


class ConditioningConfig(StrictModel):
    """A text encoder: ``CLIPConditioningInterface(ConditioningConfig(...))``."""

    use_clip: bool = Field(default=True, description="false encodes nothing")
    clip_model: str = Field(
        default="ViT-L-14", description="an architecture of open_clip, or a folder or hub id of transformers' CLIP"
    )
    clip_pretrained: str | None = Field(default="openai", description="open_clip: a tag, or a file; null: random weights")
    context_dim: int = Field(default=768, ge=1, description="width of the states; another one of the encoder is an error")
    max_length: int | None = Field(default=None, ge=3, description="tokens a chunk; by default the encoder's")
    max_chunks: int = Field(default=1, ge=1, description="longer prompts are cut into this many chunks, their states joined")
    cache_size: int = Field(default=256, ge=0, description="encoded prompts that are kept")
    guidance_scale: float = Field(default=7.5, ge=1)


class HighResModelConfig(StrictModel):
    """A latent score network: ``HighResLatentScoreModel(HighResModelConfig(...))``."""

    in_channels: int = Field(default=4, ge=1)
    out_channels: int = Field(default=4, ge=1)
    sample_size: int = Field(default=128, ge=1, description="sides of the latents, in latent pixels")
    base_channels: int = Field(default=192, ge=1)
    channel_mult: list[int] = Field(default=[1, 2, 4, 4], min_length=1)
    num_res_blocks: int = Field(default=2, ge=1)
    attention_levels: list[int] = [1, 2]
    num_heads: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    conditional: bool = Field(default=True, description="whether it attends to text states")
    context_dim: int = Field(default=768, ge=1, description="width of the text states")
    cross_attention_levels: list[int] = [1, 2]
    num_class_embeds: int | None = Field(default=None, ge=1)
    patch_size: int = Field(default=1, ge=1)
    norm_num_groups: int = Field(default=32, ge=1)
    num_resolutions: int = Field(default=1, ge=1)
    use_checkpointing: bool = Field(default=False, description="gradient checkpointing: less memory, a second forward pass")
    lora: LoRAConfig | None = Field(default=None, description="adapters that it is given at once")

    @model_validator(mode="after")
    def _is_read(self) -> "HighResModelConfig":
        if not self.conditional:
            self.refuse(["context_dim", "cross_attention_levels"], "where conditional is false")
        return self


class SamplerConfig(StrictModel):
    """``AdvancedHierarchicalDiffusionSampler(..., sampler_config=SamplerConfig(...))``."""

    hierarchical_sampling: bool = Field(default=False, description="the noisy half of the steps at lower resolutions")
    num_resolutions: int = Field(default=2, ge=2, description="of the hierarchy, for models that do not say")
    sb_iterations: int = Field(default=1000, ge=1, description="limit of the bridge's solver")
    gate: float = Field(default=10.0, ge=1, description="the bridge ends once the median of the effective references is below")

    @model_validator(mode="after")
    def _is_read(self) -> "SamplerConfig":
        if not self.hierarchical_sampling:
            self.refuse(["num_resolutions"], "without hierarchical_sampling")
        return self


class InferenceConfig(StrictModel):
    """What fits a device: a GPU profile of ``easy_api``."""

    memory_gb: int = Field(default=0, ge=0, description="of the GPU; 0 is the CPU")
    batch_size: int = Field(default=1, ge=1, description="pictures a network call")
    resolution: int = Field(default=512, ge=8, description="largest side of a picture by default, in pixels")
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    enable_clip: bool = Field(default=True, description="false refuses prompts")
    attention_slicing: bool = False
    vae_tiling: bool = False
    cpu_offload: bool = Field(default=False, description="parts wait in main memory for their turn")
    kernel_solver: str = Field(default="auto", description="kernel operator of bridges")
    description: str = ""
