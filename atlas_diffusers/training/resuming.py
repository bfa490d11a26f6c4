"""What may change when a run goes on from a checkpoint, and what may not."""

from collections.abc import Mapping
from typing import Any

from ..config import TrainingConfig
from .data import Annotated, PictureDataset
from .family import Components
from .fingerprints import data_fingerprint, fingerprint, tokenizer_fingerprint

# what decides nothing that is learned; whether a folder is another one, the fingerprint of the data tells
FREE = {
    "output_dir", "log_interval", "checkpoint_interval", "checkpoints_total_limit", "resume", "sample_interval",
    "sample_prompts", "sample_steps", "eval_interval", "eval_count", "eval_dataset", "trackers", "save_dtype", "guidance_scale",
    "license", "push_to_hub",
    "gradient_checkpointing", "cache_latents", "cache_text_embeddings", "dataset.root", "dataset.num_workers",
    "dataset.download", "dataset.batch_size", "source_dataset.root", "source_dataset.num_workers", "source_dataset.download",
}  # fmt: skip
# what takes effect from the checkpoint on
EFFECTIVE = {
    "max_steps", "epochs", "learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "gradient_clip_norm", "ema_decay",
    "micro_batch_size", "mixed_precision", "dataset.skip_bad_images", "source_dataset.skip_bad_images",
}  # fmt: skip
CONTENTS = {
    "pictures": "other pictures, captions or labels",
    "tokenizer": "another vocabulary",
    "frozen": "other weights where nothing trains",
}


def origin_of(
    config: TrainingConfig, components: Components, pictures: PictureDataset | Annotated, processes: int
) -> dict[str, Any]:
    """What tells a run from another: the recipe, the processes, and what it reads that the recipe only names."""
    frozen = fingerprint(networks=tuple(components.every()), frozen_only=True)
    contents = {"pictures": data_fingerprint(pictures), "frozen": frozen}
    if components.tokenizer is not None:
        contents["tokenizer"] = tokenizer_fingerprint(components.tokenizer)
    return origin(config.model_dump(mode="json"), processes, contents)


def origin(recipe: Mapping[str, object], processes: int, contents: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint says of where it comes from; ``contents`` has fingerprints by the names of ``CONTENTS``."""
    kept = {key: value for key, value in _flat(recipe).items() if not {key, key.split(".")[0]} & FREE}
    return {"recipe": kept, "processes": processes, "contents": contents}


def compare_origins(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """
    What of a recipe changed and takes effect from now on, one text a key.

    Raises:
        ValueError: for changes that would make another run of it, each with both values.
    """
    told, refused = [], []
    before, after = old["recipe"], new["recipe"]
    steps = [side["recipe"]["batch_size"] * side["processes"] for side in (old, new)]
    for key in sorted({*before, *after}):
        values = before.get(key), after.get(key)
        if values[0] != values[1]:
            takes_effect = key in EFFECTIVE or (key == "batch_size" and steps[0] == steps[1])
            (told if takes_effect else refused).append(f"{key} {values[0]!r} -> {values[1]!r}")
    if steps[0] != steps[1] and before["batch_size"] == after["batch_size"]:
        refused.append(f"{old['processes']} processes -> {new['processes']}, {steps[0]} pictures a step -> {steps[1]}")
    for name, meaning in CONTENTS.items():
        values = old["contents"].get(name), new["contents"].get(name)
        if values[0] is None and values[1] is not None:
            told.append(f"{name} of an earlier kind of checkpoint, which cannot be compared")
        elif values[0] != values[1]:
            refused.append(f"{meaning} (fingerprint {values[0]} -> {values[1]})")
    if refused:
        raise ValueError(
            f"it was trained otherwise: {'; '.join(refused)}. Put back what changed, or start anew in another output_dir"
        )
    return told


def _flat(recipe: Mapping[str, object], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in recipe.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
