"""What the machine has, and which profile fits it."""

import os
import platform
from typing import Any

import torch

from .config import InferenceConfig, build_preset, list_presets

QUIET = "ATLAS_DISABLE_MEMORY_WARNINGS"
GIB = 2**30


def profile_names() -> list[str]:
    """``cpu`` and the sizes of GPUs."""
    return [name.removeprefix("gpu:") for name in list_presets("gpu")]


def gpu_memory(device: int = 0) -> int:
    """Bytes of a CUDA device, 0 without one."""
    return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 0


def find_profile(gpu_memory_gb: str | None = "auto", **changes: Any) -> InferenceConfig:
    """
    A profile by name (``"16GB"``, ``"cpu"``), or by ``"auto"`` the largest that the machine's GPU has memory for.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    names = profile_names()
    name = str(gpu_memory_gb or "auto").lower()
    if name == "auto":
        # a card of 24 GB reports a little less
        available = gpu_memory() / GIB * 1.05
        name = [n for n in names if n == "cpu" or (available and build_preset(f"gpu:{n}").memory_gb <= available)][-1]
    if name not in names:
        raise ValueError(f"gpu_memory={gpu_memory_gb!r} is unknown; allowed are {['auto', *names]}")
    return build_preset(f"gpu:{name}", **changes)


def memory_warnings_wanted() -> bool:
    """False where the environment variable ``ATLAS_DISABLE_MEMORY_WARNINGS`` is 1."""
    return os.environ.get(QUIET) != "1"


def describe() -> dict[str, Any]:
    """Python, torch, devices, and the profile that ``auto`` chooses."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append({"name": properties.name, "memory_gb": round(properties.total_memory / GIB, 1)})
    profile = find_profile("auto")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "mps": torch.backends.mps.is_available(),
        "profile": "cpu" if not profile.memory_gb else f"{profile.memory_gb}gb",
        "settings": profile.model_dump(),
    }
