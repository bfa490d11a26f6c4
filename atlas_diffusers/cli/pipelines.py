"""What commands share about pipelines: which one a name means, adapters, and the device."""

from pathlib import Path
from typing import Any

from .output import no_loading_bars


def part_of_output(name: str, part: str, file: str) -> str:
    """``name``, or of the output folder of a run its ``part``, which has ``file``."""
    inside = Path(name) / part
    return str(inside) if not (Path(name) / file).is_file() and (inside / file).is_file() else name


def load_pipeline(name: str, dtype: object = None) -> Any:
    """
    A pipeline of the class that its index names: an embedded one, a folder, the output folder of a run, or a hub id.

    Raises:
        OSError: for one that is not there or is damaged.
    """
    import diffusers

    import atlas_diffusers

    from ..pipelines.loading import check_components, class_of, named_damage

    source = part_of_output(name, "pipeline", "model_index.json")
    cls = class_of(source) or "AtlasPipeline"
    options = {} if dtype is None else {"dtype": dtype}
    with no_loading_bars(), named_damage(f"{source} cannot be loaded"):
        if hasattr(atlas_diffusers, cls) or not hasattr(diffusers, cls):
            own: Any = getattr(atlas_diffusers, cls, atlas_diffusers.AtlasPipeline)
            return own.from_pretrained(source, **options)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(source, **options)
    check_components(pipeline.components, source)
    return pipeline


def split_scale(adapter: str) -> tuple[str, float]:
    """Path and scale of ``PATH[:scale]``; a path may have colons."""
    path, colon, scale = adapter.rpartition(":")
    if colon:
        try:
            return path, float(scale)
        except ValueError:
            pass
    return adapter, 1.0


def load_adapters(pipeline: Any, adapters: list[str]) -> None:
    """
    Load every ``PATH[:scale]`` into a pipeline; a path is a file, a folder with adapters, the output folder of a run, or a hub
    id.

    Raises:
        OSError: for what is not there; ``ValueError`` for adapters of another architecture, naming what does not fit.
    """
    from ..pipelines.adapters import FILE, load_adapter

    scales = {}
    for number, adapter in enumerate(adapters):
        path, scale = split_scale(adapter)
        scales[f"adapter_{number}"] = scale
        load_adapter(pipeline, part_of_output(path, "lora", FILE), f"adapter_{number}")
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))
