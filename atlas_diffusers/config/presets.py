"""Settings by name."""

import copy
import difflib
from pathlib import Path
from typing import Any

from .kernels import KernelConfig
from .models import HighResModelConfig, InferenceConfig, SamplerConfig
from .reading import read_mapping, validate
from .training import TrainingConfig

RECIPES = Path(__file__).parent / "recipes"

_COSINE = {
    "_class_name": "AtlasDDIMScheduler",
    "beta_schedule": "cosine",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def _folder(name: str, resolution: int, **options: Any) -> dict[str, Any]:
    """Pictures of your own copy of a data set, mirrored at random."""
    return {
        "name": "imagefolder", "root": f"data/{name}", "resolution": resolution, "caption_column": None, "random_flip": True,
        "num_workers": 4, **options,
    }  # fmt: skip


def _experiment(name: str, dataset: dict, model: dict, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": f"outputs/{name}", "dataset": dataset, "model": model, "text_encoder": None, "scheduler": _COSINE,
        "warmup_steps": 1000, "lr_scheduler": "constant_with_warmup", "weight_decay": 0.0, "ema_decay": 0.9999,
        "loss_weighting": {"name": "min_snr", "gamma": 5.0}, "mixed_precision": "bf16", "checkpoint_interval": 5000,
        "sample_interval": 5000, "guidance_scale": 1.0, **options,
    }  # fmt: skip


# memory of the GPU that each fits, in GB, and the recipe
EXPERIMENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "experiment:cifar10": (
        8,
        _experiment(
            "cifar10",
            {
                "name": "uoft-cs/cifar10", "image_column": "img", "caption_column": None, "label_column": "label",
                "resolution": 32, "random_flip": True, "num_workers": 2,
            },
            {
                "base_channels": 128, "channel_mult": [1, 2, 2, 2], "num_res_blocks": 2, "attention_levels": [1],
                "num_heads": 4, "num_class_embeds": 10, "dropout": 0.1,
            },
            batch_size=128, micro_batch_size=64, learning_rate=2e-4, max_steps=400_000,
        ),
    ),
    "experiment:imagenet64": (
        24,
        _experiment(
            "imagenet64",
            _folder("imagenet64", 64, label_column="label"),
            {
                "base_channels": 192, "channel_mult": [1, 2, 3, 4], "num_res_blocks": 3, "attention_levels": [2, 3],
                "num_heads": 6, "num_class_embeds": 1000,
            },
            batch_size=256, micro_batch_size=16, learning_rate=1e-4, max_steps=500_000, timestep_shift=1.5,
        ),
    ),
    "experiment:ffhq128": (
        8,
        _experiment(
            "ffhq128",
            _folder("ffhq128", 128),
            {
                "base_channels": 128, "channel_mult": [1, 2, 3, 4], "num_res_blocks": 2, "attention_levels": [2, 3],
                "num_heads": 4, "patch_size": 2,
            },
            batch_size=64, micro_batch_size=16, learning_rate=1e-4, max_steps=300_000, timestep_shift=2.0,
        ),
    ),
    "experiment:lsun256": (
        12,
        _experiment(
            "lsun256",
            _folder("lsun256", 256),
            {
                "base_channels": 160, "channel_mult": [1, 2, 3, 4], "num_res_blocks": 2, "attention_levels": [2, 3],
                "num_heads": 5, "patch_size": 4,
            },
            batch_size=64, micro_batch_size=16, learning_rate=1e-4, max_steps=500_000, timestep_shift=4.0,
            num_resolutions=2,
        ),
    ),
    "experiment:celeba1024": (
        16,
        _experiment(
            "celeba1024",
            _folder("celeba1024", 1024),
            {
                "base_channels": 128, "channel_mult": [1, 2, 3, 4, 4], "num_res_blocks": 2, "attention_levels": [3, 4],
                "num_heads": 4, "patch_size": 4,
            },
            batch_size=32, micro_batch_size=8, learning_rate=1e-4, max_steps=300_000, timestep_shift=8.0,
            num_resolutions=3, gradient_checkpointing=True,
        ),
    ),
}  # fmt: skip


# one row a profile: what fits it
_PROFILES: dict[str, dict[str, Any]] = {
    "cpu": {"batch_size": 1, "resolution": 256, "kernel_solver": "auto", "description": "no GPU"},
    "6gb": {
        "batch_size": 1, "resolution": 512, "dtype": "float16", "attention_slicing": True, "vae_tiling": True,
        "cpu_offload": True, "kernel_solver": "nystrom", "description": "GTX 1660, RTX 3050",
    },
    "8gb": {
        "batch_size": 2, "resolution": 512, "dtype": "float16", "attention_slicing": True, "vae_tiling": True,
        "description": "RTX 3060 Ti, RTX 4060",
    },
    "12gb": {"batch_size": 4, "resolution": 768, "dtype": "float16", "vae_tiling": True, "description": "RTX 3060, RTX 4070"},
    "16gb": {"batch_size": 8, "resolution": 1024, "dtype": "bfloat16", "vae_tiling": True, "description": "RTX 4080, A4000"},
    "24gb": {"batch_size": 16, "resolution": 1024, "dtype": "bfloat16", "description": "RTX 3090, RTX 4090"},
    "32gb": {"batch_size": 20, "resolution": 1536, "dtype": "bfloat16", "description": "RTX 5090, V100"},
}  # fmt: skip

PRESETS: dict[str, tuple[type, dict[str, Any]]] = {
    "model:highres_default": (HighResModelConfig, {}),
    "kernel:gaussian_multiscale": (KernelConfig, {"kernel_type": "gaussian", "multi_scale": True}),
    "sampler:hierarchical_default": (SamplerConfig, {"hierarchical_sampling": True}),
    **{
        f"gpu:{name}": (InferenceConfig, {"memory_gb": int(name.removesuffix("gb")) if name != "cpu" else 0, **row})
        for name, row in _PROFILES.items()
    },
    **{name: (TrainingConfig, recipe) for name, (_, recipe) in EXPERIMENTS.items()},
}


def list_presets(kind: str = "") -> list[str]:
    """Names that :func:`load_preset` knows, of one kind (`model`, `kernel`, `sampler`, `gpu`, `experiment`) or all."""
    return [name for name in PRESETS if name.startswith(kind)]


def load_preset(name: str) -> dict[str, Any]:
    """
    A copy of the settings called ``name``, such as the recipe ``"experiment:cifar10"``.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else f"; allowed are {list_presets()}"
        raise ValueError(f"preset {name!r} is unknown{hint}")
    return copy.deepcopy(PRESETS[name][1])


def build_preset(name: str, **changes: object):
    """The configuration called ``name``, with some fields changed: ``build_preset("gpu:8gb", batch_size=1)``."""
    data = load_preset(name)
    return validate(PRESETS[name][0], data | changes)


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """
    The file of a recipe that ships with the package.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name not in list_recipes():
        raise ValueError(f"recipe {name!r} is unknown; allowed are {list_recipes()}")
    return RECIPES / f"{name}.yaml"


def read_recipe(source: str) -> dict[str, Any]:
    """A recipe from a YAML or JSON file, one that ships with the package by its name, or the preset ``experiment:NAME``."""
    source = str(source)
    if source.startswith("experiment:"):
        return load_preset(source)
    return read_mapping(recipe_file(source) if source in list_recipes() and not Path(source).exists() else source)
