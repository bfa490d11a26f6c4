"""What a run is about to do, in a few lines."""

import json
from collections import Counter
from typing import Any

import torch

from ..conditioning import token_lists
from ..config import TrainingConfig
from .data import Annotated, PictureDataset
from .family import Components
from .memory import memory_of

SHOWN, LONGEST = 3, 40


def summarise(
    config: TrainingConfig,
    pictures: PictureDataset | Annotated,
    components: Components,
    trained: int,
    derived: bool = False,
    start: str | None = None,
    processes: int = 1,
) -> str:
    """
    Lines of data, networks, steps, memory and where the run goes on.

    Args:
        config: completed.
        trained: numbers that train.
        derived: whether the network was derived from the data.
        start: the checkpoint that the run goes on from.
        processes: of the run, each with a batch of its own.
    """
    every = sum(p.numel() for network in components.every() for p in network.parameters())
    name = type(components.unet).__name__
    rows = {
        "data": _data(config, pictures),
        "network": f"{name}, {trained:,} of {every:,} numbers train" + (", as the data ask for:" if derived else ""),
        "model": json.dumps(config.model) if derived else None,
        "captions": _captions(config, pictures, components.tokenizer),
        "buckets": _buckets(pictures),
        "steps": _steps(config, pictures, processes),
        "memory": _memory(config, components),
        "goes on": start and f"from {start}",
        "output": config.output_dir,
    }
    return "\n".join(f"{title:9} {text}" for title, text in rows.items() if text)


def _data(config: TrainingConfig, pictures: Any) -> str:
    d = config.dataset
    source = f"{d.name}" + (f" ({d.root})" if d.root else "")
    if d.streaming:
        return f"{source}, a stream, at {d.resolution} pixels"
    told = getattr(getattr(pictures, "pictures", pictures).data.info, "description", "")
    return f"{source}: {told or f'{len(pictures):,} pictures'}, at {d.resolution} pixels"


def _captions(config: TrainingConfig, pictures: Any, tokenizer: Any) -> str | None:
    """Some, and how many are longer than what the text encoder reads."""
    if config.dataset.streaming or not (texts := [text for text in pictures.captions() if text]):
        return None
    chosen = [texts[i * len(texts) // SHOWN] for i in range(min(SHOWN, len(texts)))]
    shown = "such as " + ", ".join(repr(text if len(text) <= LONGEST else text[:LONGEST] + "...") for text in chosen)
    if tokenizer is None:
        return f"{shown}; not read"
    cut = sum(len(tokens) > tokenizer.model_max_length for tokens in token_lists(tokenizer, texts))
    return shown + (f"; {cut} are cut after {tokenizer.model_max_length} tokens" if cut else "")


def _buckets(pictures: Any) -> str | None:
    """Heights and widths, with how many pictures have them."""
    if getattr(pictures, "sizes", None) is None:
        return None
    return ", ".join(f"{height}x{width} ({number})" for (height, width), number in sorted(Counter(pictures.sizes).items()))


def _steps(config: TrainingConfig, pictures: Any, processes: int) -> str:
    batch = config.batch_size * processes
    text = f"{config.steps:,} of {batch} pictures" + (f" on {processes} processes" if processes > 1 else "")
    if config.dataset.streaming:
        return text
    return f"{text}, {config.steps * batch / len(pictures):.3g} passes over the data"


def _memory(config: TrainingConfig, components: Components) -> str | None:
    """Of a process, in float32; nothing is said of adapters, and of pipelines of Diffusers."""
    if config.lora is not None or components.pipeline is not None:
        return None
    memory = memory_of(config, components)
    has = f", the GPU has {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f}" if torch.cuda.is_available() else ""
    return f"about {memory.total / 2**30:.2g} GiB in float32 ({memory.state / 2**30:.2g} of it weights and averages){has}"
