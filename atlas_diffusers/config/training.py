"""The training recipe."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .dataset import DatasetConfig, StrictModel

if TYPE_CHECKING:
    from peft import LoraConfig

DEFAULT_STEPS = 1000
# YAML reads an unquoted `no` as false
PRECISIONS = {True: "fp16", False: "no"}
# keys from before `loss_weighting`: the name and the option that each stands for
WEIGHT_KEYS = {"min_snr_gamma": ("min_snr", "gamma"), "p2_gamma": ("p2", "gamma"), "edm_sigma_data": ("edm", "sigma_data")}
BRIDGING = ("source_dataset", "bridge_sigma", "bridge_passes", "bridge_steps")
# what the loss of an objective does not read
NOT_READ = {
    "denoising": (*BRIDGING, "time_distribution", "logit_mean", "logit_std"),
    "flow_matching": BRIDGING,
    "bridge_matching": (
        "loss_weighting", "offset_noise", "cache_latents", "scheduler", "time_distribution", "logit_mean", "logit_std",
        "sample_prompts",
    ),
}  # fmt: skip
# what only the data that are trained on have
UNREAD_OF = {
    "eval_dataset": ("random_flip", "num_workers", "batch_size"),
    "source_dataset": ("aspect_buckets", "num_workers", "batch_size", "label_column", "aliases_column"),
}


class TextEncoderConfig(StrictModel):
    """A CLIP text encoder trained from scratch together with the network, its vocabulary learned from the captions."""

    hidden_size: int = Field(default=128, ge=1)
    num_layers: int = Field(default=2, ge=1)
    num_heads: int = Field(default=4, ge=1)
    max_length: int = Field(default=16, ge=3, description="tokens a prompt, begin and end marks included")
    vocab_size: int = Field(default=2048, ge=514)


class LoRAConfig(StrictModel):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a pipeline that stays as it is; only they train."""

    rank: int = Field(default=8, ge=1)
    alpha: float | None = Field(default=None, gt=0, description="adapters are scaled by alpha/rank; by default 1")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] = Field(default=["to_q", "to_k", "to_v", "to_out.0"], min_length=1, description="of the network")
    text_encoder_modules: list[str] = Field(
        default_factory=list, description="of the text encoders, such as [q_proj, k_proj, v_proj, out_proj]; none by default"
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="other ranks by the ends of modules' names, regular expressions such as `attn2.to_k`"
    )
    quantize: Literal["8bit", "4bit"] | None = Field(
        default=None, description="of the network that adapters are added to, by bitsandbytes; not tested on a GPU"
    )

    def peft(self, modules: list[str], patterns: Iterable[str] = ()) -> "LoraConfig":
        """PEFT's configuration of adapters for some modules, with the ranks of some of ``rank_pattern``."""
        from peft import LoraConfig

        ranks = {pattern: self.rank_pattern[pattern] for pattern in patterns}
        options: dict[str, Any] = {"lora_alpha": self.alpha or self.rank, "lora_dropout": self.dropout, "rank_pattern": ranks}
        # a scale of 1 whatever the rank
        options |= {} if self.alpha else {"alpha_pattern": dict(ranks)}
        return LoraConfig(r=self.rank, target_modules=modules, **options)


class ClassImagesConfig(StrictModel):
    """Prior preservation (Ruiz et al. 2022, arXiv 2208.12242): pictures of the subject's class train beside the data."""

    prompt: str = Field(min_length=1, description="names the class, such as `a dog`")
    count: int = Field(default=100, ge=1, description="pictures; the pipeline makes those that the folder lacks")
    weight: float = Field(default=1.0, gt=0, description="of their loss")
    root: str | None = Field(default=None, description="their folder; by default class_images in output_dir")


class TrainingConfig(StrictModel):
    """A training run: data, network, noise, optimiser, and what is written when."""

    output_dir: str = "outputs/train"
    seed: int = 0
    dataset: DatasetConfig = DatasetConfig()
    init_from: str | None = Field(
        default=None, description="pipeline whose network, text encoder and tokenizer training starts from"
    )
    vae: str | None = Field(default=None, description="pipeline, or autoencoder, whose latents a new network learns")
    model: dict[str, Any] = Field(
        default_factory=dict, description="arguments of AtlasUNet2DModel, or of the network that `_class_name` among them names"
    )
    text_encoder: TextEncoderConfig | None = TextEncoderConfig()
    train_text_encoder: bool | None = Field(
        default=None,
        description="false keeps the text encoder of init_from as it is; by default those of Diffusers' pipelines stay",
    )
    lora: LoRAConfig | None = Field(default=None, description="train adapters of init_from instead of its weights")
    class_images: ClassImagesConfig | None = Field(
        default=None, description="pictures of the subject's class that keep init_from from forgetting it"
    )
    scheduler: dict[str, Any] | None = Field(
        default=None, description="a scheduler configuration; by default that of init_from, or AtlasDDIMScheduler's"
    )

    batch_size: int = Field(default=32, ge=1, description="pictures an optimiser step and process")
    micro_batch_size: int | None = Field(default=None, ge=1, description="pictures a backward pass; must divide batch_size")
    max_steps: int | None = Field(default=None, ge=1, description="optimiser steps; 1000 without `epochs`")
    epochs: int | None = Field(default=None, ge=1, description="passes over the data, instead of max_steps")
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="`muon` orthogonalises the steps of linear layers (arXiv 2502.16982), beside AdamW"
    )
    learning_rate: float = Field(default=1e-3, gt=0)
    lr_scheduler: Literal["constant_with_warmup", "cosine", "linear"] = "cosine"
    warmup_steps: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_clip_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    loss_weighting: dict[str, float | str] | None = Field(
        default=None,
        description="`{name: min_snr, gamma: 5}` (arXiv 2303.09556), `{name: p2, gamma: 1, k: 1}` (arXiv 2204.00227) or "
        "`{name: edm, sigma_data: 0.5}` (arXiv 2206.00364); null weighs every timestep 1",
    )
    offset_noise: float = Field(default=0.0, ge=0, description="standard deviation of a shift of each channel's noise")
    objective: Literal["denoising", "flow_matching", "bridge_matching"] = Field(
        default="denoising",
        description="`flow_matching` learns the velocity of straight lines to noise (arXiv 2210.02747), `bridge_matching` to "
        "carry source_dataset to dataset (arXiv 2307.03672)",
    )
    time_distribution: Literal["uniform", "logit_normal"] = Field(
        default="uniform", description="of the times of flow_matching, before timestep_shift (arXiv 2403.03206)"
    )
    logit_mean: float = Field(default=0.0, allow_inf_nan=False, description="of logit_normal times; above 0 is noisier")
    logit_std: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="of logit_normal times")
    source_dataset: DatasetConfig | None = Field(default=None, description="pictures that a bridge starts from")
    bridge_sigma: float = Field(
        default=0.0, ge=0, description="σ of the Brownian bridges, in units of [-1, 1]; 0: straight lines"
    )
    bridge_passes: int = Field(
        default=0,
        ge=0,
        description="0 learns the flow of a bridge; n learns its diffusion, by two networks, in n passes of iterative "
        "Markovian fitting (arXiv 2303.16852)",
    )
    bridge_steps: int = Field(
        default=10, ge=1, description="steps of two network calls that make a pair of the second and later passes"
    )
    coupling: Literal["independent", "sinkhorn", "semidiscrete", "mixture", "paired"] = Field(
        default="independent",
        description="`sinkhorn` pairs noise (or source) and data of a batch by entropic transport (arXiv 2304.14772), "
        "`semidiscrete` noise and the whole data set (arXiv 2509.25519); "
        "`mixture` draws the data of a bridge from a MixtureBridge fitted to all pictures; `paired`: source and data of equal "
        "caption",
    )
    coupling_condition_weight: float = Field(
        default=3.0,
        ge=0,
        allow_inf_nan=False,
        description="of equal labels, or alike captions, in the semidiscrete coupling, in deviations of its scores; 0: none",
    )
    coupling_epsilon: float = Field(default=0.02, gt=0, description="ε of that transport, times the mean squared distance")
    num_resolutions: int = Field(
        default=1, ge=1, description="train at this many resolutions, each half the one before, drawn anew for each micro-batch"
    )
    timestep_shift: float = Field(default=1.0, gt=0, description="above 1 trains noisy timesteps more often (arXiv 2403.03206)")
    caption_dropout: float = Field(default=0.1, ge=0, le=1, description="how often the caption is empty, for guidance")
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(lambda v: PRECISIONS.get(v, v))] = Field(
        default="no", description="true is fp16, false no"
    )
    gradient_checkpointing: bool = False
    cache_latents: bool = Field(default=False, description="encode every picture once, into safetensors files in output_dir")
    cache_text_embeddings: bool = Field(default=False, description="the same for captions; the text encoder must not train")

    log_interval: int = Field(default=50, ge=1)
    checkpoint_interval: int = Field(default=500, ge=1)
    checkpoints_total_limit: int = Field(default=2, ge=1)
    resume: bool | Literal["newest_complete"] = Field(
        default=True,
        description="continue from the newest checkpoint in output_dir; `newest_complete` passes over those that are damaged",
    )
    sample_interval: int | None = Field(default=None, ge=1, description="steps between sample grids")
    sample_prompts: list[str] = []
    sample_steps: int = Field(default=25, ge=1)
    eval_interval: int | None = Field(default=None, ge=1, description="steps between evaluations; needs the extra `eval`")
    eval_count: int = Field(default=128, ge=8, description="pictures that an evaluation generates")
    eval_dataset: DatasetConfig | None = Field(
        default=None, description="what they are compared with; by default the training data"
    )
    trackers: list[str] = Field(default_factory=list, description="of Accelerate, such as [tensorboard]")
    save_dtype: Literal["float32", "float16"] = Field(
        default="float32", description="of the saved network's, or adapters', weights"
    )
    license: str | None = Field(default=None, description="of the trained weights, for their model card, such as `cc-by-4.0`")
    push_to_hub: str | None = Field(
        default=None, description="`user/name` of the hub, to which the result is uploaded at the end"
    )
    guidance_scale: float = Field(default=3.0, ge=1, description="of sample grids, and the default of the saved pipeline")

    @model_validator(mode="before")
    @classmethod
    def _short_weights(cls, data: Any) -> Any:
        """`min_snr_gamma: 5` and its like are short for rows of `loss_weighting`."""
        if not isinstance(data, dict):
            return data
        chosen = [key for key in ("loss_weighting", *WEIGHT_KEYS) if data.get(key) is not None]
        if len(chosen) > 1:
            raise ValueError(f"give at most one of {', '.join(('loss_weighting', *WEIGHT_KEYS))}, got {', '.join(chosen)}")
        data = {key: value for key, value in data.items() if key not in WEIGHT_KEYS} | {key: data[key] for key in chosen}
        for key in set(chosen) & set(WEIGHT_KEYS):
            name, option = WEIGHT_KEYS[key]
            data["loss_weighting"] = {"name": name, option: data.pop(key)}
        return data

    @property
    def samples(self) -> bool:
        """Whether the run makes pictures before it ends."""
        return bool(self.sample_interval or self.eval_interval or self.class_images)

    @property
    def trains_text_encoder(self) -> bool:
        """Whether a text encoder, if there is one, has weights that train."""
        if self.lora is not None:
            return bool(self.lora.text_encoder_modules)
        return not self.cache_text_embeddings if self.train_text_encoder is None else self.train_text_encoder

    @property
    def steps(self) -> int:
        """``max_steps``, which a recipe with ``epochs`` has once :func:`complete_recipe` has counted its data."""
        if self.max_steps is None:
            raise ValueError("max_steps is not known before the data are counted")
        return self.max_steps

    @model_validator(mode="after")
    def _batches_fit(self):
        if (loaded := self.dataset.batch_size) is not None:
            if "batch_size" in self.model_fields_set and self.batch_size != loaded:
                raise ValueError(f"batch_size={self.batch_size}, but dataset.batch_size={loaded}: give one of them")
            self.batch_size = loaded
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}")
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(f"give epochs={self.epochs} or max_steps={self.max_steps}, not both")
        if self.epochs is None and self.max_steps is None:
            self.max_steps = DEFAULT_STEPS
        if self.dataset.streaming and (self.epochs is not None or self.cache_latents):
            raise ValueError("a stream has no known length: with dataset.streaming give max_steps, and no cache_latents")
        if self.dataset.streaming and self.cache_text_embeddings:
            raise ValueError("cache_text_embeddings needs to know every caption: it cannot be used with dataset.streaming")
        if self.dataset.aspect_buckets and (self.cache_latents or self.objective == "bridge_matching"):
            raise ValueError("dataset.aspect_buckets cannot be used with cache_latents or objective='bridge_matching'")
        if self.eval_dataset is not None:
            if self.eval_dataset.aspect_buckets:
                raise ValueError("eval_dataset.aspect_buckets: an evaluation compares pictures of one size")
            self.eval_dataset.refuse(UNREAD_OF["eval_dataset"], "of eval_dataset, whose pictures are compared as they are")
        if self.source_dataset is not None:
            self.source_dataset.refuse(UNREAD_OF["source_dataset"], "of source_dataset; dataset says it for both")
            if self.coupling == "paired" and self.source_dataset.random_flip != self.dataset.random_flip:
                raise ValueError(
                    "coupling='paired' mirrors both pictures of a pair: give random_flip to both data sets, or none"
                )
        if self.cache_latents and self.dataset.skip_bad_images:
            raise ValueError("cache_latents reads every picture: it cannot be used with dataset.skip_bad_images")
        return self

    @model_validator(mode="after")
    def _networks_fit(self):
        if self.init_from is not None and self.model:
            raise ValueError("give init_from or model, not both: init_from brings its own network")
        if self.init_from is not None and self.vae is not None:
            raise ValueError("give init_from or vae, not both: init_from brings its own autoencoder")
        if self.init_from is not None and self.text_encoder not in (None, TextEncoderConfig()):
            raise ValueError("give init_from or text_encoder, not both: init_from brings its own text encoder")
        if self.cache_latents and self.init_from is None and self.vae is None:
            raise ValueError("cache_latents needs an autoencoder, of init_from or vae")
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora needs init_from, the pipeline to adapt")
        if self.class_images is not None and (self.init_from is None or self.dataset.streaming or self.source_dataset):
            raise ValueError("class_images needs init_from, and neither dataset.streaming nor source_dataset")
        if self.text_encoder is not None and self.dataset.caption_column is None and self.dataset.caption is None:
            raise ValueError("text_encoder needs dataset.caption_column; set text_encoder: null to train without prompts")
        if self.init_from is None and self.train_text_encoder is False:
            raise ValueError("train_text_encoder: false needs init_from, whose text encoder stays as it is")
        if self.lora is not None and self.lora.text_encoder_modules and self.train_text_encoder is False:
            raise ValueError("train_text_encoder: false, but lora.text_encoder_modules names what trains of it")
        if self.cache_text_embeddings and (self.init_from is None or self.trains_text_encoder):
            raise ValueError("cache_text_embeddings needs a text encoder that does not train: train_text_encoder: false")
        return self

    @model_validator(mode="after")
    def _is_shown(self):
        """What only looks at the run is read."""
        if self.sample_interval is None:
            self.refuse(("sample_prompts",), "without sample_interval")
        if self.eval_interval is not None and (self.eval_dataset or self.dataset).streaming:
            raise ValueError("eval_interval with a stream needs an eval_dataset that is not one")
        if self.eval_interval is None:
            self.refuse(("eval_count", "eval_dataset"), "without eval_interval")
        if self.lora is not None and not self.samples:
            self.refuse(("sample_steps",), "of adapters without sample_interval, eval_interval or class_images")
        return self

    def _check_semidiscrete(self) -> None:
        """It knows every picture as it is shown."""
        d = self.dataset
        changed = {
            "dataset.streaming": d.streaming, "dataset.random_flip": d.random_flip, "dataset.aspect_buckets": d.aspect_buckets,
            "dataset.skip_bad_images": d.skip_bad_images, "num_resolutions": self.num_resolutions > 1,
            "offset_noise": self.offset_noise, "class_images": self.class_images,
            "objective: bridge_matching": self.objective == "bridge_matching",
        }  # fmt: skip
        if found := [name for name, given in changed.items() if given]:
            raise ValueError(f"coupling='semidiscrete' cannot be used with {', '.join(found)}")

    @model_validator(mode="after")
    def _objective_fits(self):
        if self.loss_weighting is not None and "name" not in self.loss_weighting:
            raise ValueError("loss_weighting needs a name, such as {name: min_snr, gamma: 5}")
        bridging = self.objective == "bridge_matching"
        if bridging != (self.source_dataset is not None):
            raise ValueError(f"objective={self.objective!r}: bridge_matching needs source_dataset, the others take none")
        if self.coupling == "semidiscrete":
            self._check_semidiscrete()
        else:
            self.refuse(("coupling_condition_weight",), "without coupling='semidiscrete'")
        if self.coupling != "sinkhorn":
            self.refuse(("coupling_epsilon",), "without coupling='sinkhorn'")
        elif (self.micro_batch_size or self.batch_size) == 1:
            raise ValueError("coupling='sinkhorn' pairs the pictures of a micro-batch, which has one")
        if self.coupling in ("paired", "mixture") and not bridging:
            raise ValueError(f"coupling={self.coupling!r} pairs two data sets: it needs objective='bridge_matching'")
        self.refuse(NOT_READ[self.objective], f"by objective={self.objective!r}")
        self._check_bridge()
        if self.time_distribution == "uniform":
            self.refuse(("logit_mean", "logit_std"), "without time_distribution='logit_normal'")
        if self.source_dataset is not None and (self.dataset.streaming or self.source_dataset.streaming):
            raise ValueError("objective='bridge_matching' pairs pictures by their place: its data cannot be streamed")
        return self

    def _check_bridge(self) -> None:
        if (self.bridge_passes or self.coupling == "mixture") and not self.bridge_sigma:
            asking = f"bridge_passes={self.bridge_passes}" if self.bridge_passes else "coupling='mixture'"
            raise ValueError(f"{asking} needs bridge_sigma, the scale of the diffusion")
        if self.max_steps is not None and self.bridge_passes > self.max_steps:
            raise ValueError(f"bridge_passes={self.bridge_passes} need as many steps, got max_steps={self.max_steps}")
        if self.bridge_passes and self.lora is not None:
            raise ValueError("bridge_passes trains two networks, which adapters of one (lora) are not")
        if self.bridge_passes < 2 and self.bridge_steps != type(self).model_fields["bridge_steps"].default:
            raise ValueError(f"bridge_steps={self.bridge_steps} needs bridge_passes of at least 2")
        if self.coupling != "mixture":
            return
        conditions = {"caption_column": self.text_encoder, "label_column": self.dataset.label_column}
        if named := [name for name, value in conditions.items() if value is not None]:
            raise ValueError(f"coupling='mixture' draws data without captions and labels: set text_encoder and {named} to null")
        if self.num_resolutions > 1:
            raise ValueError(f"coupling='mixture' is fitted at one resolution, not num_resolutions={self.num_resolutions}")
