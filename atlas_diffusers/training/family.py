"""What a run is made of, and how a family of pipelines encodes captions and calls its network."""

import copy
import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch

from ..config import TrainingConfig
from ..pipelines.loading import class_of, named_damage
from .fingerprints import fingerprint, tokenizer_fingerprint

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Components:
    """
    What a run trains and what it trains with.

    ``text_encoder``, ``tokenizer``, ``vae`` and ``backward_unet`` may be ``None``, and ``unet``, what denoises, may be a
    transformer. ``family`` says how they go together; ``pipeline`` is the one of Diffusers that they are of.
    """

    unet: Any
    text_encoder: Any
    tokenizer: Any
    vae: Any
    scheduler: Any
    family: "type[Family]"
    pipeline: Any = None
    backward_unet: Any = None

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """The networks that may train, by their names in the pipeline."""
        return self.family.networks(self)

    @property
    def others(self) -> list[torch.nn.Module]:
        """The networks that never train."""
        every = [self.vae] if self.pipeline is None else self.pipeline.components.values()
        known = list(map(id, self.networks.values()))
        return [module for module in every if isinstance(module, torch.nn.Module) and id(module) not in known]

    def every(self) -> list[torch.nn.Module]:
        """All networks that there are."""
        return [*self.networks.values(), *self.others]


class Family:
    """
    Pipelines of Diffusers whose own ``encode_prompt`` makes what the network is told of captions.

    A row of the table says: ``network``, the component that denoises; ``objective``, what it learned by; ``conditions``, by the
    names that the network knows, the places in what ``encode_prompt`` returns of the states of captions and of what stands for
    an empty one; ``asked``, further arguments of ``encode_prompt``. ``predict`` calls the network.

    Args:
        components: of the run.
        wrapped: the networks that may train, as the accelerator prepared them.
        config: the recipe.
    """

    network: ClassVar[str] = "unet"
    objective: ClassVar[str] = "denoising"
    conditions: ClassVar[dict[str, tuple[int, int]]] = {"encoder_hidden_states": (0, 1)}
    asked: ClassVar[dict[str, Any]] = {}
    is_guided: ClassVar[bool] = True
    tells_sizes: ClassVar[bool] = False

    def __init__(self, components: Components, wrapped: dict[str, Any], config: TrainingConfig):
        self.components, self.wrapped, self.config = components, wrapped, config
        self.encoder = copy.copy(components.pipeline)
        for name in set(wrapped) - {self.network}:
            if wrapped[name] is not components.networks[name]:
                self.encoder.__dict__[name] = _Prepared(components.networks[name], wrapped[name])

    @classmethod
    def load(cls, config: TrainingConfig) -> Components:
        """
        The components of ``init_from``; around adapters in the precision of the run, but for the autoencoder.

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
        return Components(network, text_encoder, pipeline.tokenizer, pipeline.vae, None, cls, pipeline)

    @classmethod
    def networks(cls, components: Components) -> dict[str, torch.nn.Module]:
        """The network, and the text encoders that adapters of this pipeline may have, by their names in it."""
        adaptable = getattr(components.pipeline, "_lora_loadable_modules", [])
        encoders = {name: getattr(components.pipeline, name, None) for name in adaptable if name.startswith("text_encoder")}
        return {cls.network: components.unet} | {name: module for name, module in encoders.items() if module is not None}

    @classmethod
    def side_multiple(cls, components: Components) -> int:
        """What must divide the sides of pictures."""
        return components.pipeline.vae_scale_factor * components.unet.config.get("patch_size", 1)

    def encode(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """What the network is told of captions, each ``(batch, ...)``; an empty one is what guidance leads away from."""
        empty = torch.tensor([not text for text in texts])
        guided = {"do_classifier_free_guidance": bool(empty.any())} if self.is_guided else {}
        arguments = {"device": self.device, "num_images_per_prompt": 1, **guided, **self.asked}
        found = self.encoder.encode_prompt(texts, **arguments)
        return {name: _chosen(empty, found[own], found[none]) for name, (own, none) in self.conditions.items()}

    def fingerprint(self) -> str:
        """Of the tokenizers and of the networks that encode captions, which must be frozen."""
        components = {"tokenizer": self.components.tokenizer, "text_encoder": self.components.text_encoder}
        if self.components.pipeline is not None:
            components = self.components.pipeline.components
        named = {name: part for name, part in components.items() if part is not None}
        tokens = [tokenizer_fingerprint(part) for name, part in named.items() if name.startswith("tokenizer")]
        encoders = tuple(part for name, part in named.items() if name.startswith("text_encoder"))
        return fingerprint(*tokens, networks=encoders)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.components.unet.parameters()).device

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


def _quantization(bits: str, component: str, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"lora.quantize={bits!r} needs bitsandbytes: pip install bitsandbytes")
    options: dict[str, Any] = {f"load_in_{bits}": True}
    if bits == "4bit":
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return diffusers.PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{bits}", quant_kwargs=options, components_to_quantize=[component]
    )
