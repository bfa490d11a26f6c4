"""Reference data of the bridge: read, encoded, weighted, and stored with a pipeline."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..bridges import SchrodingerBridgeSolver
from ..conditioning import tokenize
from ..config import BridgeConfig
from ..config.reading import validate
from .bridging import BridgeRun
from .latents import encode_latents

FILE = "references.safetensors"


@dataclass
class References:
    """
    Clean data that samples are coupled with.

    Args:
        values: pictures in [-1, 1] or latents, ``(m, channels, height, width)``.
        weights: ``(m,)``, non-negative; ``None`` is uniform.
        captions: m texts, which prompts are compared with; ``None`` weights all prompts alike.
    """

    values: torch.Tensor
    weights: torch.Tensor | None = None
    captions: list[str] | None = None

    def save(self, file: Path) -> None:
        """Write one safetensors file."""
        tensors = {"references": self.values.contiguous()}
        if self.weights is not None:
            tensors["weights"] = self.weights.contiguous()
        save_file(tensors, file, metadata={"captions": json.dumps(self.captions)})

    @classmethod
    def load(cls, file: str | Path) -> "References":
        """Read a file written by :meth:`save`, or any safetensors file with a tensor ``references``."""
        with safe_open(file, framework="pt") as stored:
            names = list(stored.keys())
            if "references" not in names:
                raise ValueError(f"{file} has tensors {names}; expected `references` and optionally `weights`")
            weights = stored.get_tensor("weights") if "weights" in names else None
            captions = json.loads((stored.metadata() or {}).get("captions", "null"))
            return cls(stored.get_tensor("references"), weights, captions)


class ReferencesMixin:
    """References of a pipeline with ``unet``, ``vae``, ``text_encoder`` and ``image_processor``."""

    references: References | None = None

    def set_references(self, references, weights: torch.Tensor | None = None) -> None:
        """
        Keep references with the pipeline: used by calls with ``bridge=``, saved by ``save_pretrained``.

        Args:
            references: as in ``__call__``; ``None`` removes them.
            weights: ``(m,)``, non-negative.
        """
        size = self.unet.config.sample_size * self.vae_scale_factor
        self.references = None if references is None else self._read_references(references, weights, size, size)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in Diffusers; references go into ``references.safetensors``."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.references is not None:
            self.references.save(Path(save_directory) / FILE)

    def _read_references(self, given, weights, height: int, width: int) -> References:
        """References in the space that is sampled, from a tensor, a file, a dataset with ``image`` and ``text``."""
        if isinstance(given, (str, Path)):
            given = References.load(given)
        elif isinstance(given, torch.Tensor):
            given = References(given)
        elif not isinstance(given, References):
            captions = list(given["text"]) if "text" in given.column_names else None
            images = [image.convert("RGB") for image in given["image"]]
            given = References(self.image_processor.preprocess(images, height, width), captions=captions)
        weights = given.weights if weights is None else torch.as_tensor(weights)
        return References(self._to_sampled_space(given.values, height, width), weights, given.captions)

    @torch.no_grad()
    def _to_sampled_space(self, values: torch.Tensor, height: int, width: int) -> torch.Tensor:
        latent = (self.unet.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if tuple(values.shape[1:]) == latent:
            return values
        if self.vae is None or tuple(values.shape[1:]) != (3, height, width):
            pictures = "" if self.vae is None else f" or pictures {(3, height, width)}"
            raise ValueError(f"references have shape {tuple(values.shape[1:])}; expected {latent}{pictures}")
        device, dtype = self._execution_device, self.vae.dtype
        parts = values.split(8)
        return torch.cat([encode_latents(self.vae, part.to(device, dtype), sample_mode="argmax") for part in parts])

    def _caption_weights(self, captions: list[str], prompts: list[str], temperature: float) -> torch.Tensor:
        """Softmax over references of cos(caption, prompt)/temperature in the text encoder's pooled states, ``(prompts, m)``."""

        def pooled(texts: list[str]) -> torch.Tensor:
            ids = tokenize(self.tokenizer, texts).to(self.text_encoder.device)
            states = self.text_encoder(ids).pooler_output
            return torch.nn.functional.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)

        known = torch.cat([pooled(captions[i : i + 256]) for i in range(0, len(captions), 256)])
        return (pooled(prompts) @ known.T / temperature).softmax(-1)

    def _bridge(self, references, weights, bridge, prompt, batch: int, height: int, width: int, scheduler):
        """The bridge of a call, or ``None`` for a call that has none."""
        if references is None and bridge is None:
            if weights is not None:
                raise ValueError("reference_weights were given without references")
            return None
        stored = self.references
        if references is None and stored is None:
            raise ValueError("bridge was given, but neither the call nor the pipeline has references")
        channels = self.unet.config.in_channels, self.unet.config.out_channels
        if channels[0] != channels[1]:
            raise ValueError(f"the bridge needs a network with as many channels out as in, got {channels[1]} and {channels[0]}")
        config = bridge if isinstance(bridge, BridgeConfig) else validate(BridgeConfig, dict(bridge or {}))
        found = self._read_references(stored if references is None else references, weights, height, width)
        values = found.values.to(self._execution_device, torch.promote_types(self.unet.dtype, torch.float32))
        options = {name: getattr(config, name) for name in ("epsilon", "rho", "tolerance", "max_iterations", "solver_type")}
        if prompt is None or found.captions is None or self.text_encoder is None:
            solver = SchrodingerBridgeSolver(values, found.weights, **options)
            return BridgeRun(config, [torch.arange(batch, device=values.device)], [solver], scheduler)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        unique, repeats = list(dict.fromkeys(prompts)), batch // len(prompts)
        similar = self._caption_weights(found.captions, unique, config.caption_temperature)
        base = 1.0 if found.weights is None else found.weights.to(similar)
        solvers = [SchrodingerBridgeSolver(values, row * base, **options) for row in similar]
        of_sample = torch.tensor([unique.index(text) for text in prompts], device=values.device).repeat_interleave(repeats)
        groups = [(of_sample == index).nonzero()[:, 0] for index in range(len(unique))]
        return BridgeRun(config, groups, solvers, scheduler)
