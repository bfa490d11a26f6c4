"""The training recipe."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LOSS_WEIGHTS = ("min_snr_gamma", "p2_gamma", "edm_sigma_data")


class StrictModel(BaseModel):
    """Rejects unknown keys."""

    model_config = ConfigDict(extra="forbid")


class DatasetConfig(StrictModel):
    """Where pictures and captions come from."""

    name: str = Field("embedded:emoji", description="`embedded:emoji`, `imagefolder`, a parquet file or a hub id")
    root: str | None = Field(None, description="folder of an imagefolder dataset")
    split: str = "train"
    categories: list[str] | None = Field(None, description="keep only these categories (embedded emoji)")
    image_column: str = "image"
    caption_column: str | None = Field("text", description="null trains without prompts")
    aliases_column: str | None = Field(None, description="a list of further captions, one drawn at random each time")
    alias_probability: float = Field(0.3, ge=0, le=1, description="how often an alias replaces the caption")
    resolution: int = Field(32, ge=1)
    center_crop: bool = True
    random_flip: bool = False
    num_workers: int = Field(0, ge=0)


class TextEncoderConfig(StrictModel):
    """A CLIP text encoder trained from scratch together with the network, its vocabulary learned from the captions."""

    hidden_size: int = Field(128, ge=1)
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(4, ge=1)
    max_length: int = Field(16, ge=3, description="tokens a prompt, begin and end marks included")
    vocab_size: int = Field(2048, ge=514)


class LoRAConfig(StrictModel):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a pipeline that stays as it is; only they train."""

    rank: int = Field(8, ge=1)
    alpha: float | None = Field(None, gt=0, description="adapters are scaled by alpha/rank; by default 1")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] = Field(["to_q", "to_k", "to_v", "to_out.0"], min_length=1, description="of the network")
    text_encoder_modules: list[str] = Field(
        default_factory=list, description="of the text encoder, such as [q_proj, k_proj, v_proj, out_proj]; none by default"
    )


class TrainingConfig(StrictModel):
    """A training run: data, network, noise, optimiser, and what is written when."""

    output_dir: str
    seed: int = 0
    dataset: DatasetConfig = DatasetConfig()
    init_from: str | None = Field(None, description="pipeline whose network, text encoder and tokenizer training starts from")
    model: dict[str, Any] = Field(default_factory=dict, description="arguments of AtlasUNet2DModel")
    text_encoder: TextEncoderConfig | None = TextEncoderConfig()
    lora: LoRAConfig | None = Field(None, description="train adapters of init_from instead of its weights")
    scheduler: dict[str, Any] | None = Field(
        None, description="a scheduler configuration; by default that of init_from, or AtlasDDIMScheduler's"
    )

    batch_size: int = Field(32, ge=1, description="pictures an optimiser step and process")
    micro_batch_size: int | None = Field(None, ge=1, description="pictures a backward pass; must divide batch_size")
    max_steps: int = Field(1000, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    lr_scheduler: Literal["constant_with_warmup", "cosine", "linear"] = "cosine"
    warmup_steps: int = Field(100, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    gradient_clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    min_snr_gamma: float | None = Field(None, gt=0, description="γ of min-SNR weights (arXiv 2303.09556)")
    p2_gamma: float | None = Field(None, gt=0, description="γ of P2 weights 1/(1 + SNR)^γ (arXiv 2204.00227)")
    edm_sigma_data: float | None = Field(None, gt=0, description="σ_data of EDM's weights (arXiv 2206.00364)")
    offset_noise: float = Field(0.0, ge=0, description="standard deviation of a shift of each channel's noise")
    coupling: Literal["independent", "sinkhorn"] = Field(
        "independent", description="`sinkhorn` pairs noise and data of a batch by entropic transport (arXiv 2304.14772)"
    )
    coupling_epsilon: float = Field(0.02, gt=0, description="ε of that transport, times the mean squared distance")
    timestep_shift: float = Field(1.0, gt=0, description="above 1 trains noisy timesteps more often (arXiv 2403.03206)")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="how often the caption is empty, for guidance")
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False

    log_interval: int = Field(50, ge=1)
    checkpoint_interval: int = Field(500, ge=1)
    checkpoints_total_limit: int = Field(2, ge=1)
    resume: bool = Field(True, description="continue from the newest checkpoint in output_dir")
    sample_interval: int | None = Field(None, ge=1, description="steps between sample grids")
    sample_prompts: list[str] = []
    sample_steps: int = Field(25, ge=1)
    eval_interval: int | None = Field(None, ge=1, description="steps between evaluations; needs the extra `eval`")
    eval_count: int = Field(128, ge=8, description="pictures that an evaluation generates")
    eval_dataset: DatasetConfig | None = Field(None, description="what they are compared with; by default the training data")
    trackers: list[str] = Field(default_factory=list, description="of Accelerate, such as [tensorboard]")
    save_dtype: Literal["float32", "float16"] = Field("float32", description="of the saved network's, or adapters', weights")
    guidance_scale: float = Field(3.0, ge=1, description="of sample grids, and the default of the saved pipeline")

    @model_validator(mode="after")
    def _fits(self):
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}")
        if self.init_from is not None and self.model:
            raise ValueError("give init_from or model, not both: init_from brings its own network")
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora needs init_from, the pipeline to adapt")
        chosen = [name for name in LOSS_WEIGHTS if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"give at most one of {', '.join(LOSS_WEIGHTS)}, got {', '.join(chosen)}")
        if self.text_encoder is not None and self.dataset.caption_column is None:
            raise ValueError("text_encoder needs dataset.caption_column; set text_encoder: null to train without prompts")
        return self
