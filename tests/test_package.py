import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

import atlas_diffusers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "atlas_diffusers"

ALLOWED = {
    "schedules": set(),
    "config": set(),
    "conditioning": {"config"},
    "pretrained": set(),
    "models": {"config"},
    "schedulers": {"schedules"},
    "kernels": set(),
    "solvers": {"config", "kernels", "schedules"},
    "pipelines": {"models", "schedules", "schedulers", "solvers", "conditioning", "config", "pretrained"},
    "metrics": {"pretrained", "pipelines"},
    "training": {"config", "conditioning", "metrics", "models", "schedules", "solvers", "pretrained", "pipelines"},
    "hardware": {"config"},
    "check_hardware": {"hardware"},
    "easy_api": {"config", "hardware", "pipelines"},
    "system": {"config", "pipelines", "schedulers", "schedules"},
    "plots": set(),
    "plots_bridge": {"metrics", "plots", "solvers"},
    "cli_bridge": {"pipelines", "plots", "plots_bridge", "pretrained"},
    "cli_calibrate": {"pipelines", "schedulers"},
    "cli_evaluate": {"config", "pipelines", "training"},
    "cli_schedulers": {"schedulers", "pretrained", "plots"},
    "examples": {
        "conditioning", "config", "easy_api", "kernels", "pipelines", "schedules", "solvers", "training",
    },
    "cli_compare": {"plots", "system"},
    "cli_config": {"check_hardware", "config", "hardware", "system"},
    "cli_train": {"config"},
    "cli": {
        "pipelines", "metrics", "config", "cli_bridge", "cli_calibrate", "cli_compare", "cli_config", "cli_evaluate",
        "cli_schedulers", "cli_train",
    },
}


def imported_rooms(file: Path) -> set[str]:
    """Rooms of the package that a module imports."""
    depth = len(file.relative_to(PACKAGE).parts)
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            rooms |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("atlas_diffusers."):
            rooms.add(node.module.split(".")[1])
    return rooms


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_arrows_point_one_way(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__", "_registration"):
        return
    assert imported_rooms(file) - {room} <= ALLOWED[room]


@pytest.mark.parametrize("name", [n for n in atlas_diffusers.__all__ if n != "SCHEDULERS"])
def test_public_names_resolve(name):
    assert getattr(atlas_diffusers, name).__name__ == name


def test_classes_are_found_through_diffusers():
    for name in ("AtlasUNet2DModel", "AtlasDDIMScheduler", "AtlasPipeline"):
        assert getattr(diffusers, name) is getattr(atlas_diffusers, name)


def test_registration_is_idempotent():
    from atlas_diffusers._registration import register

    before = dict(diffusers._objects)
    register()
    assert dict(diffusers._objects) == before


def test_import_adds_only_light_modules():
    code = """
import sys
import diffusers.pipelines.pipeline_loading_utils
before = set(sys.modules)
import atlas_diffusers
added = {name for name in set(sys.modules) - before if not name.startswith("atlas_diffusers")}
print(sorted(added))
print(sorted(name for name in sys.modules if name.startswith("atlas_diffusers")))
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["[]", "['atlas_diffusers', 'atlas_diffusers._registration']"]


def test_no_pickle_and_no_catch_all():
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "training").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None and getattr(node.type, "id", "") not in ("Exception", "BaseException"), file
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert "pickle" not in names, file
            if isinstance(node, ast.Attribute) and node.attr == "load":
                # a foreign checkpoint: tensors only
                safe = file.name == "foreign.py" and "weights_only=True" in file.read_text()
                assert getattr(node.value, "id", "") != "torch" or safe, file


def test_every_recipe_field_has_a_reader():
    from atlas_diffusers.config import DatasetConfig, TextEncoderConfig, TrainingConfig

    sources = [f.read_text() for f in PACKAGE.rglob("*.py") if f.parent.name != "config"]
    sources.append(inspect.getsource(TrainingConfig.trains_text_encoder.fget))
    for model in (DatasetConfig, TextEncoderConfig, TrainingConfig):
        for field in model.model_fields:
            assert any(f".{field}" in source for source in sources), f"{model.__name__}.{field}"


def test_every_field_of_the_facades_has_a_reader():
    from atlas_diffusers.config import (
        ConditioningConfig,
        HighResModelConfig,
        InferenceConfig,
        NoiseSchedulerConfig,
        SamplerConfig,
    )
    from atlas_diffusers.models.high_res import OWN

    sources = [f.read_text() for f in PACKAGE.rglob("*.py") if f.parent.name != "config"]
    for model in (ConditioningConfig, InferenceConfig, SamplerConfig):
        for field in model.model_fields:
            assert any(f".{field}" in source for source in sources), f"{model.__name__}.{field}"
    unet = set(inspect.signature(atlas_diffusers.AtlasUNet2DModel.__init__).parameters)
    high_res = (PACKAGE / "models" / "high_res.py").read_text()
    for field in HighResModelConfig.model_fields:
        assert field in unet or (field in OWN and f"config.{field}" in high_res), field
    classes = [getattr(atlas_diffusers, name) for name in atlas_diffusers.SCHEDULERS]
    options = {option for cls in classes for option in inspect.signature(cls.__init__).parameters}
    step = set(inspect.signature(atlas_diffusers.AtlasDDIMScheduler.step).parameters)
    fixed = {"sample_padding_threshold", "sample_padding_norm"}  # kept for old files, only their defaults are allowed
    assert set(NoiseSchedulerConfig.model_fields) <= options | step | fixed


def test_every_scheduler_option_has_a_reader():
    from atlas_diffusers.schedulers.time_grid import GRID_OF_OPTION

    folder = PACKAGE / "schedulers"
    source = "\n".join(f.read_text() for f in folder.glob("*.py"))
    for name in atlas_diffusers.SCHEDULERS:
        for option in list(inspect.signature(getattr(atlas_diffusers, name).__init__).parameters)[1:]:
            read = f"c.{option}" in source or f"config.{option}" in source or f'("{option}"' in source
            assert read or option in GRID_OF_OPTION, option


def test_modules_import_alone():
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":
            importlib.import_module(".".join(p for p in parts if p != "__init__"))
