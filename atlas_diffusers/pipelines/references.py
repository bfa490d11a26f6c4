"""Reference data of the bridge: read, encoded, weighted, and stored with a pipeline."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ..bridges import GatedBridge, ReferenceShards, SchrodingerBridgeSolver
from ..bridges.references import ReferenceSet
from ..conditioning import tokenize
from ..config import BridgeConfig
from ..config.reading import validate
from ..denoising import ReferenceCoupling, SchedulerProcess, bridge_timesteps, gate_timestep
from ..image_files import decode, on_white, read_folder
from .latents import encode_latents
from .loading import named_damage
from .prompts import Prompts

if TYPE_CHECKING:
    from .base import AtlasPipelineBase

FILE = "references.safetensors"


@dataclass
class References:
    """
    Clean data that samples are coupled with.

    Args:
        values: pictures in [-1, 1] or latents, ``(m, channels, height, width)``; or those in files, see
            :class:`~atlas_diffusers.bridges.ReferenceShards`.
        weights: ``(m,)``, non-negative; ``None`` is uniform.
        captions: m texts, which prompts are compared with; ``None`` weights all prompts alike.
    """

    values: torch.Tensor | ReferenceSet
    weights: torch.Tensor | None = None
    captions: list[str] | None = None

    def as_tensor(self) -> torch.Tensor:
        """The values in memory; ``ValueError`` for those in files."""
        if isinstance(self.values, ReferenceSet):
            raise ValueError(f"{type(self.values).__name__} lie in files of their own: they are not saved with a pipeline")
        return self.values

    def save(self, file: Path) -> None:
        """Write one safetensors file; ``ValueError`` for references that are in files already."""
        tensors = {"references": self.as_tensor().contiguous()}
        if self.weights is not None:
            tensors["weights"] = self.weights.contiguous()
        save_file(tensors, file, metadata={"captions": json.dumps(self.captions)})

    @classmethod
    def load(cls, file: str | Path) -> "References":
        """Read a file written by :meth:`save`, or any safetensors file with a tensor ``references``."""
        with named_damage(f"{file} is damaged"), safe_open(file, framework="pt") as stored:
            names = list(stored.keys())
            if "references" not in names:
                raise ValueError(f"{file} has tensors {names}; expected `references` and optionally `weights`")
            weights = stored.get_tensor("weights") if "weights" in names else None
            captions = json.loads((stored.metadata() or {}).get("captions", "null"))
            values = stored.get_tensor("references")
        is_text = isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)
        if captions is not None and not (is_text and len(captions) == len(values)):
            raise ValueError(f"{file} has captions {captions!r:.100}; expected {len(values)} texts")
        return cls(values, weights, captions)


def read_references(pipeline: "AtlasPipelineBase", given: Any, weights: Any, height: int, width: int) -> References:
    """
    References in the space that is sampled.

    Args:
        given: a tensor, a safetensors file, a folder of pictures, a list of PIL pictures, a data set with ``image`` and, if it
            has captions, ``text``, or :class:`~atlas_diffusers.bridges.ReferenceShards`, or the list of their files.

    Raises:
        ValueError: for anything else, and shapes that do not fit; ``OSError`` for what cannot be read.
    """
    if isinstance(given, str | Path):
        given = read_folder(str(given), "train", "auto") if Path(given).is_dir() else References.load(given)
    elif isinstance(given, list | tuple) and given and all(isinstance(file, str | Path) for file in given):
        given = ReferenceShards(given)
    if isinstance(given, torch.Tensor | ReferenceSet):
        given = References(given)
    elif not isinstance(given, References):
        given = _of_pictures(pipeline, given, height, width)
    weights = given.weights if weights is None else torch.as_tensor(weights)
    return References(_to_sampled_space(pipeline, given.values, height, width), weights, given.captions)


def _of_pictures(pipeline: "AtlasPipelineBase", given: Any, height: int, width: int) -> References:
    """A list of PIL pictures, or a data set, decoded or not."""
    columns = getattr(given, "column_names", None)
    listed = isinstance(given, list | tuple) and given and all(isinstance(image, Image.Image) for image in given)
    if not listed and (columns is None or "image" not in columns):
        found = f"a data set with columns {columns}" if columns else f"{type(given).__name__} {given!r:.60}"
        raise ValueError(
            "references must be a tensor, ReferenceShards or their files, a safetensors file, a folder, a list of PIL pictures "
            f"or a data set with a column image; got {found}"
        )
    grey = pipeline.vae is None and pipeline.unet.config.in_channels == 1
    pictures, data_set = [], cast(Any, given)
    for index, image in enumerate(given if listed else data_set["image"]):
        image = on_white(image) if isinstance(image, Image.Image) else decode(image, index)
        pictures.append(image.convert("L" if grey else "RGB"))
    captions = list(data_set["text"]) if columns and "text" in columns and any(data_set["text"]) else None
    return References(pipeline.image_processor.preprocess(pictures, height, width), captions=captions)


@torch.no_grad()
def _to_sampled_space(pipeline: "AtlasPipelineBase", values: Any, height: int, width: int) -> Any:
    factor, vae = pipeline.vae_scale_factor, pipeline.vae
    latent = (pipeline.unet.config.in_channels, height // factor, width // factor)
    if tuple(values.shape[1:]) == latent:
        return values
    if vae is None or isinstance(values, ReferenceSet) or tuple(values.shape[1:]) != (3, height, width):
        pictures = "" if vae is None or isinstance(values, ReferenceSet) else f" or pictures {(3, height, width)}"
        raise ValueError(f"references have shape {tuple(values.shape[1:])}; expected {latent}{pictures}")
    device, dtype = pipeline._execution_device, vae.dtype
    return torch.cat([encode_latents(vae, part.to(device, dtype), sample_mode="argmax") for part in values.split(8)])


def _caption_weights(
    tokenizer: Any, text_encoder: Any, captions: list[str], prompts: list[str], temperature: float
) -> torch.Tensor:
    """Softmax over references of cos(caption, prompt)/temperature in the text encoder's pooled states, ``(prompts, m)``."""

    def pooled(texts: list[str]) -> torch.Tensor:
        ids = tokenize(tokenizer, texts).to(text_encoder.device)
        states = text_encoder(ids).pooler_output
        return torch.nn.functional.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)

    known = torch.cat([pooled(captions[i : i + 256]) for i in range(0, len(captions), 256)])
    return (pooled(prompts) @ known.T / temperature).softmax(-1)


@dataclass
class BridgePlan:
    """
    The bridge of a call, before its steps are chosen.

    Args:
        config: the call's options.
        groups: indices of the samples that are coupled together, ``(n,)`` each.
        solvers: one a group.
        gate_timestep: where bridge steps of their own end; ``None`` without such steps.
    """

    config: BridgeConfig
    groups: list[torch.Tensor]
    solvers: list[SchrodingerBridgeSolver]
    gate_timestep: int | None = None

    def choose_timesteps(self, scheduler: Any, bridge_steps: int, network_steps: int) -> list[int]:
        """``bridge_steps`` timesteps above the gate, then those of the network."""
        first, gate = gate_timestep(scheduler, self.solvers, self.config.gate)
        self.gate_timestep = round(gate)
        return bridge_timesteps(first, gate, bridge_steps, network_steps)

    def coupling(self, process: SchedulerProcess, timesteps: torch.Tensor) -> ReferenceCoupling:
        """The coupling of the call whose steps these are."""
        until = 0.0
        if self.gate_timestep is not None:
            until = process.level(timesteps[timesteps <= self.gate_timestep][0]).sigma_hat
        bridges = [GatedBridge(solver, self.config.gate, until) for solver in self.solvers]
        strength = self.config.strength if self.config.mode == "correct" else None
        return ReferenceCoupling(self.groups, bridges, strength)


def plan_bridge(
    pipeline: "AtlasPipelineBase",
    references: Any,
    weights: torch.Tensor | None,
    bridge: BridgeConfig | dict | None,
    prompts: Prompts,
    height: int,
    width: int,
) -> BridgePlan | None:
    """The bridge of a call, samples of one prompt in one group; ``None`` for a call that has none."""
    if references is None and bridge is None:
        if weights is not None:
            raise ValueError("reference_weights were given without references")
        return None
    stored = pipeline.references
    if references is None and stored is None:
        raise ValueError("bridge was given, but neither the call nor the pipeline has references")
    channels = pipeline.unet.config.in_channels, pipeline.unet.config.out_channels
    if channels[0] != channels[1]:
        raise ValueError(f"the bridge needs a network with as many channels out as in, got {channels[1]} and {channels[0]}")
    config = bridge if isinstance(bridge, BridgeConfig) else validate(BridgeConfig, dict(bridge or {}))
    found = read_references(pipeline, stored if references is None else references, weights, height, width)
    values = found.values
    if isinstance(values, torch.Tensor):
        values = values.to(torch.promote_types(pipeline.unet.dtype, torch.float32))
    values = values.to(pipeline._execution_device)
    options = {name: getattr(config, name) for name in ("epsilon", "rho", "tolerance", "max_iterations", "solver_type")}
    if prompts.prompt is None or found.captions is None or pipeline.text_encoder is None:
        config.refuse(["caption_temperature"], "without captions of the references, a prompt and a text encoder")
        solver = SchrodingerBridgeSolver(values, found.weights, **options)
        return BridgePlan(config, [torch.arange(prompts.batch, device=values.device)], [solver])
    texts = [prompts.prompt] if isinstance(prompts.prompt, str) else prompts.prompt
    unique = list(dict.fromkeys(texts))
    similar = _caption_weights(pipeline.tokenizer, pipeline.text_encoder, found.captions, unique, config.caption_temperature)
    base = 1.0 if found.weights is None else found.weights.to(similar)
    solvers = [SchrodingerBridgeSolver(values, row * base, **options) for row in similar]
    of_sample = torch.tensor([unique.index(text) for text in texts], device=values.device)
    of_sample = of_sample.repeat_interleave(prompts.copies)
    return BridgePlan(config, [(of_sample == index).nonzero()[:, 0] for index in range(len(unique))], solvers)
