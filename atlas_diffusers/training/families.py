"""Families of pipelines that training starts from: how each encodes captions and calls its network."""

import copy
import importlib.util
import inspect
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch

import atlas_diffusers

from ..conditioning import tokenize
from ..config import TrainingConfig
from ..pipelines.loading import class_of, named_damage
from .fingerprints import fingerprint, tokenizer_fingerprint
from .parts import Networks, pixels_of_latent

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Family:
    """
    Pipelines of Diffusers whose own ``encode_prompt`` makes what the network is told of captions.

    A row of the table says: ``network``, the component that denoises; ``objective``, what it learned by; ``conditions``, by the
    names that the network knows, the places in what ``encode_prompt`` returns of the states of captions and of what stands for
    an empty one; ``asked``, further arguments of ``encode_prompt``. ``predict`` calls the network.

    Args:
        parts: of the run.
        wrapped: the networks that may train, as the accelerator prepared them.
        config: the recipe.
    """

    network: ClassVar[str] = "unet"
    objective: ClassVar[str] = "denoising"
    conditions: ClassVar[dict[str, tuple[int, int]]] = {"encoder_hidden_states": (0, 1)}
    asked: ClassVar[dict[str, Any]] = {}
    is_guided: ClassVar[bool] = True
    tells_sizes: ClassVar[bool] = False

    def __init__(self, parts: Networks, wrapped: dict[str, Any], config: TrainingConfig):
        self.parts, self.wrapped, self.config = parts, wrapped, config
        self.encoder = copy.copy(parts.pipeline)
        for name in set(wrapped) - {self.network}:
            if wrapped[name] is not parts.modules[name]:
                self.encoder.__dict__[name] = _Prepared(parts.modules[name], wrapped[name])

    @classmethod
    def load(cls, config: TrainingConfig) -> Networks:
        """
        The parts of ``init_from``; around adapters in the precision of the run, but for the autoencoder.

        Raises:
            ImportError: for ``lora.quantize`` without bitsandbytes; ``OSError`` for a folder that cannot be loaded.
        """
        source, lora = str(config.init_from), config.lora
        dtype = torch.float32 if lora is None else PRECISIONS[config.mixed_precision]
        options: dict[str, Any] = {"dtype": {"default": dtype, "vae": torch.float32}}
        if lora is not None and lora.quantize is not None:
            options["quantization_config"] = _quantization(lora.quantize, cls.network, dtype)
        with torch.random.fork_rng(), named_damage(f"{source} cannot be loaded"):
            pipeline = getattr(diffusers, str(class_of(source))).from_pretrained(source, **options)
        if lora is not None and lora.quantize is not None:
            from peft import prepare_model_for_kbit_training

            prepare_model_for_kbit_training(getattr(pipeline, cls.network), use_gradient_checkpointing=False)
        pipeline.set_progress_bar_config(disable=True)
        network, text_encoder = getattr(pipeline, cls.network), getattr(pipeline, "text_encoder", None)
        return Networks(network, text_encoder, pipeline.tokenizer, pipeline.vae, None, cls, pipeline)

    @classmethod
    def modules(cls, parts: Networks) -> dict[str, torch.nn.Module]:
        """The network, and the text encoders that adapters of this pipeline may have, by their names in it."""
        adaptable = getattr(parts.pipeline, "_lora_loadable_modules", [])
        encoders = {name: getattr(parts.pipeline, name, None) for name in adaptable if name.startswith("text_encoder")}
        return {cls.network: parts.unet} | {name: module for name, module in encoders.items() if module is not None}

    @classmethod
    def side_multiple(cls, parts: Networks) -> int:
        """What must divide the sides of pictures."""
        return parts.pipeline.vae_scale_factor * parts.unet.config.get("patch_size", 1)

    def encode(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """What the network is told of captions, each ``(batch, ...)``; an empty one is what guidance leads away from."""
        empty = torch.tensor([not text for text in texts])
        guided = {"do_classifier_free_guidance": bool(empty.any())} if self.is_guided else {}
        arguments = {"device": self.device, "num_images_per_prompt": 1, **guided, **self.asked}
        found = self.encoder.encode_prompt(texts, **arguments)
        return {name: _chosen(empty, found[own], found[none]) for name, (own, none) in self.conditions.items()}

    def fingerprint(self) -> str:
        """Of the tokenizers and of the networks that encode captions, which must be frozen."""
        components = {"tokenizer": self.parts.tokenizer, "text_encoder": self.parts.text_encoder}
        if self.parts.pipeline is not None:
            components = self.parts.pipeline.components
        named = {name: part for name, part in components.items() if part is not None}
        tokens = [tokenizer_fingerprint(part) for name, part in named.items() if name.startswith("tokenizer")]
        encoders = tuple(part for name, part in named.items() if name.startswith("text_encoder"))
        return fingerprint(*tokens, networks=encoders)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.parts.unet.parameters()).device

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """
        What the network says of noisy data.

        Args:
            network: the one of the pipeline, or a copy, as the accelerator prepared it.
            sample: (batch, channels, height, width).
            timesteps: (batch,).
            conditions: of :meth:`encode`, and ``class_labels`` and ``time_ids`` where there are some.
        """
        return network(sample, timesteps, **conditions).sample


def _chosen(empty: torch.Tensor, own: torch.Tensor, none: torch.Tensor | None) -> torch.Tensor:
    if none is None or none is own:
        return own
    return torch.where(empty.to(own.device).reshape(-1, *[1] * (own.ndim - 1)), none, own)


class _Prepared:
    """A network as its pipeline sees it, called through the accelerator's wrapper, which joins gradients of processes."""

    def __init__(self, module: torch.nn.Module, wrapper: Any):
        self.module, self.wrapper = module, wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class Own(Family):
    """Pipelines of this package, and what they load: one UNet, and at most one CLIP text encoder."""

    def __init__(self, parts: Networks, wrapped: dict[str, Any], config: TrainingConfig):
        self.parts, self.wrapped, self.config = parts, wrapped, config

    @classmethod
    def load(cls, config: TrainingConfig) -> Networks:
        """The parts of ``init_from``, in float32."""
        if config.lora is not None and config.lora.quantize is not None:
            raise ValueError("lora.quantize is for pipelines of Diffusers")
        start = atlas_diffusers.AtlasPipeline.from_pretrained(config.init_from, dtype=torch.float32)
        return Networks(start.unet, start.text_encoder, start.tokenizer, start.vae, start.scheduler, cls)

    @classmethod
    def modules(cls, parts: Networks) -> dict[str, torch.nn.Module]:
        """``unet`` and, where they are, ``backward_unet`` and ``text_encoder``."""
        modules = {name: getattr(parts, name) for name in ("unet", "backward_unet", "text_encoder")}
        return {name: module for name, module in modules.items() if module is not None}

    @classmethod
    def side_multiple(cls, parts: Networks) -> int:
        """What must divide the sides of pictures, at one resolution."""
        return pixels_of_latent(parts.vae) * getattr(parts.unet, "size_multiple", 1)

    def encode(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """The last hidden states of the text encoder."""
        ids = tokenize(self.parts.tokenizer, texts).to(self.device)
        return {"encoder_hidden_states": self.wrapped["text_encoder"](ids).last_hidden_state}

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """Also without captions."""
        states, labels = conditions.get("encoder_hidden_states"), conditions.get("class_labels")
        return network(sample, timesteps, states, class_labels=labels).sample


class StableDiffusionXL(Family):
    """Two CLIP towers; pooled states, and sizes and crops of pictures, are added to the time (arXiv 2307.01952)."""

    conditions = {"encoder_hidden_states": (0, 1), "text_embeds": (2, 3)}
    tells_sizes = True

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """With ``time_ids`` (batch, 6)."""
        states = conditions["encoder_hidden_states"]
        added = {"text_embeds": conditions["text_embeds"], "time_ids": conditions["time_ids"].to(states)}
        return network(sample, timesteps, states, added_cond_kwargs=added).sample


class StableDiffusion3(Family):
    """A transformer over patches with two CLIP towers and T5, of a flow (arXiv 2403.03206)."""

    network, objective = "transformer", "flow_matching"
    conditions = {"encoder_hidden_states": (0, 1), "pooled_projections": (2, 3)}
    asked = {"prompt_2": None, "prompt_3": None}

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """The velocity."""
        return network(sample, timestep=timesteps, **conditions).sample


class Flux(Family):
    """A transformer over packed 2x2 patches with one CLIP tower and T5, of a flow; guidance may be an input."""

    network, objective = "transformer", "flow_matching"
    conditions = {"encoder_hidden_states": (0, 0), "pooled_projections": (1, 1)}
    asked = {"prompt_2": None}
    is_guided = False

    @classmethod
    def side_multiple(cls, parts: Networks) -> int:
        """Two latents are a patch."""
        return 2 * parts.pipeline.vae_scale_factor

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """The velocity; a network that takes guidance is told the recipe's ``guidance_scale``."""
        pipeline, (batch, channels, height, width) = diffusers.FluxPipeline, sample.shape
        states, guidance = conditions["encoder_hidden_states"], None
        if self.parts.unet.config.guidance_embeds:
            guidance = torch.full((batch,), self.config.guidance_scale, device=sample.device)
        output = network(
            pipeline._pack_latents(sample, batch, channels, height, width),
            timestep=timesteps / 1000,
            guidance=guidance,
            img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, sample.device, states.dtype),
            txt_ids=torch.zeros(states.shape[1], 3).to(states),
            **conditions,
        ).sample
        return pipeline._unpack_latents(output, height, width, vae_scale_factor=1)


class PixArt(Family):
    """A transformer over patches with T5 (arXiv 2310.00426); of its output the half that is the prediction."""

    network = "transformer"
    conditions = {"encoder_hidden_states": (0, 2), "encoder_attention_mask": (1, 3)}

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """Networks of 1,024 pixels are told the size of pictures."""
        batch, _, height, width = sample.shape
        added = {"resolution": None, "aspect_ratio": None}
        if self.parts.unet.config.sample_size == 128:
            factor, states = self.parts.pipeline.vae_scale_factor, conditions["encoder_hidden_states"]
            sizes = {"resolution": [height * factor, width * factor], "aspect_ratio": [height / width]}
            added = {name: torch.tensor(value).repeat(batch, 1).to(states) for name, value in sizes.items()}
        output = network(sample, timestep=timesteps, added_cond_kwargs=added, **conditions).sample
        return output[:, : sample.shape[1]]


class Sana(Family):
    """A linear transformer with Gemma on latents of 32 pixels, of a flow (arXiv 2410.10629)."""

    network, objective = "transformer", "flow_matching"
    conditions = {"encoder_hidden_states": (0, 2), "encoder_attention_mask": (1, 3)}
    # what a call puts before every caption
    asked = {
        "complex_human_instruction": inspect.signature(diffusers.SanaPipeline.__call__)
        .parameters["complex_human_instruction"]
        .default
    }

    def predict(self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """The velocity."""
        scaled = timesteps * self.parts.unet.config.timestep_scale
        return network(sample, timestep=scaled, **conditions).sample


FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": Family,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "SanaPipeline": Sana,
}


def family_of(config: TrainingConfig) -> type[Family]:
    """
    How ``init_from`` is trained; bridges and several resolutions are those of this package's pipelines.

    Raises:
        ValueError: for a pipeline around a transformer that is none of ``FAMILIES``.
    """
    if config.init_from is None or config.objective == "bridge_matching" or config.num_resolutions > 1:
        return Own
    name = class_of(config.init_from) or ""
    cls = getattr(diffusers, name, None)
    if name not in FAMILIES and cls is not None and "transformer" in inspect.signature(cls).parameters:
        known = ", ".join(FAMILIES)
        raise ValueError(f"init_from={config.init_from!r} is a {name}; trained are {known} and pipelines of a UNet")
    return FAMILIES.get(name, Own)


def _quantization(bits: str, component: str, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"lora.quantize={bits!r} needs bitsandbytes: pip install bitsandbytes")
    options: dict[str, Any] = {f"load_in_{bits}": True}
    if bits == "4bit":
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return diffusers.PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{bits}", quant_kwargs=options, components_to_quantize=[component]
    )


class StockCall:
    """A pipeline of Diffusers called as ours are: sizes, steps and guidance that a call leaves open are the recipe's."""

    has_text = True

    def __init__(self, pipeline: Any, config: TrainingConfig):
        side = config.dataset.resolution
        known = inspect.signature(type(pipeline).__call__).parameters
        given = {
            "height": side, "width": side, "num_inference_steps": config.sample_steps,
            "guidance_scale": config.guidance_scale, "use_resolution_binning": False,
        }  # fmt: skip
        self.pipeline, self.given = pipeline, {name: value for name, value in given.items() if name in known}

    def __call__(self, **arguments: Any) -> Any:
        return self.pipeline(**self.given | {name: value for name, value in arguments.items() if value is not None})

    def save_pretrained(self, folder: Path) -> None:
        """As a folder of Diffusers."""
        self.pipeline.save_pretrained(folder)
