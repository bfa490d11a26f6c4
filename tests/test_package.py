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
    "kernels": set(),
    "pretrained": set(),
    "image_files": set(),
    "pictures": {"metrics", "transport", "bridges", "pretrained"},
    "metrics": {"kernels", "pipelines", "pretrained"},
    "hardware": {"config"},
    "check_hardware": {"hardware"},
    "conditioning": {"config"},
    "models": {"config"},
    "transport": {"kernels"},
    "bridges": {"kernels", "schedules", "transport"},
    "schedulers": {"schedules"},
    "denoising": {"bridges", "conditioning", "models", "schedulers", "schedules"},
    "originals": {"bridges", "config", "denoising", "models"},
    "solvers": {"bridges", "denoising", "originals", "transport"},
    "pipelines": {
        "bridges", "conditioning", "config", "denoising", "image_files", "models", "pretrained", "schedulers", "schedules",
    },
    "training": {
        "bridges", "conditioning", "config", "denoising", "image_files", "metrics", "models", "pictures", "pipelines",
        "pretrained", "schedulers", "schedules", "transport",
    },
    "easy_api": {"config", "hardware", "pipelines"},
    "system": {"config", "denoising", "pictures", "pipelines", "schedulers", "schedules"},
    "app": {
        "conditioning", "config", "denoising", "image_files", "pictures", "pipelines", "pretrained", "schedulers", "schedules",
        "training",
    },
    "cli": {
        "app", "check_hardware", "config", "hardware", "image_files", "metrics", "pictures", "pipelines", "pretrained",
        "schedulers", "system", "training",
    },
    "examples": {
        "bridges", "conditioning", "config", "easy_api", "kernels", "originals", "pictures", "pipelines", "schedules",
        "solvers", "training", "transport",
    },
}  # fmt: skip
NO_ROOM = ("__init__", "__main__", "_registration")


def imported_modules(file: Path, at_import_time: bool = False) -> set[str]:
    """Dotted names of the package's modules that a file imports; by default also those inside functions."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if at_import_time else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("atlas_diffusers.") and module_file(name)}


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_arrows_point_one_way(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in NO_ROOM:
        return
    rooms = {name.split(".")[1] for name in imported_modules(file)} - {room, *NO_ROOM}
    assert rooms <= ALLOWED[room], f"{room} imports {sorted(rooms - ALLOWED[room])}"


def test_rooms_have_no_circles():
    def reachable(room, seen=()):
        assert room not in seen, f"circle {[*seen, room]}"
        for other in ALLOWED[room]:
            reachable(other, (*seen, room))

    for room in ALLOWED:
        reachable(room)


def test_modules_have_no_circles():
    """No module imports itself through others of its room when it is loaded."""
    graph = {file: set() for file in PACKAGE.rglob("*.py")}
    for file in graph:
        graph[file] = {module_file(name) for name in imported_modules(file, at_import_time=True)}
        graph[file] = {other for other in graph[file] if other.name != "__init__.py"} - {file}
    done = set()

    def visit(file, path=()):
        assert file not in path, f"circle {[str(f.relative_to(PACKAGE)) for f in (*path, file)]}"
        if file not in done:
            for other in graph[file]:
                visit(other, (*path, file))
            done.add(file)

    for file in graph:
        visit(file)


def test_the_top_folder_holds_few_files():
    assert len(list(PACKAGE.glob("*.*"))) <= 8


@pytest.mark.parametrize("name", [n for n in atlas_diffusers.__all__ if n != "SCHEDULERS"])
def test_public_names_resolve(name):
    assert getattr(atlas_diffusers, name).__name__ == name


def names_for_editors(file):
    """What a file that editors read imports from the package, by name; ``*`` stands for all that the module imports so."""
    names = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for alias in node.names:
                if alias.name == "*":
                    names |= names_for_editors(file.parent / str(node.module) / "__init__.py")
                else:
                    names[alias.name] = node.module
    return names


def test_editors_see_what_is_imported_when_it_is_asked_for():
    seen = names_for_editors(PACKAGE / "__init__.pyi")
    own = {name for name in atlas_diffusers.__all__ if not name.endswith("NoiseScheduler")} | {"BaseNoiseScheduler"}
    assert own - {"SCHEDULERS", "ModelMixin", "SchedulerMixin", "DiffusionPipeline"} <= seen.keys()
    for room in (atlas_diffusers.schedulers, atlas_diffusers.models):
        for name in names_for_editors(Path(str(room.__file__))):
            assert name in room.__all__ and getattr(room, name).__name__ == name


def test_classes_are_found_through_diffusers():
    for name in ("AtlasUNet2DModel", "AtlasDDIMScheduler", "AtlasPipeline"):
        assert getattr(diffusers, name) is getattr(atlas_diffusers, name)


def test_registration_is_idempotent():
    from atlas_diffusers._registration import register

    before = dict(diffusers._objects), list(sys.meta_path)
    register()
    assert (dict(diffusers._objects), sys.meta_path) == before


def test_import_adds_only_light_modules():
    code = """
import sys
import diffusers.pipelines.pipeline_loading_utils
before = set(sys.modules)
import atlas_diffusers
added = {name for name in set(sys.modules) - before if not name.startswith("atlas_diffusers")}
print(sorted(added))
ours = {name for name in sys.modules if name.startswith("atlas_diffusers")}
print(sorted(name for name in ours if not name.startswith("atlas_diffusers.schedules")))  # which has the beta schedules' names
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    light = ["atlas_diffusers", *(f"atlas_diffusers.{name}" for name in ("_registration", "models", "schedulers"))]
    assert lines == ["[]", str(light)]


def test_import_and_help_need_neither_torch_nor_diffusers():
    code = """
import sys
import atlas_diffusers.cli
try:
    atlas_diffusers.cli.main(["generate", "--help"])
except SystemExit:
    print(sorted({"torch", "diffusers", "transformers", "PIL", "yaml", "pydantic"} & set(sys.modules)))
import diffusers
print(diffusers.AtlasDDIMScheduler.__module__)
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-2:] == ["[]", "atlas_diffusers.schedulers.scheduling_atlas_ddim"]


def test_diffusers_chooses_our_pipeline_by_its_task(tmp_path):
    from conftest import build_tiny_pipeline

    build_tiny_pipeline().save_pretrained(tmp_path)
    found = diffusers.AutoPipelineForText2Image.from_pretrained(tmp_path)
    assert type(found) is atlas_diffusers.AtlasPipeline


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


def configurations():
    """Every class of the room that a file can be checked against."""
    from atlas_diffusers.config.dataset import StrictModel

    for file in (PACKAGE / "config").glob("*.py"):
        importlib.import_module(f"atlas_diffusers.config.{file.stem}".removesuffix(".__init__"))
    return sorted(StrictModel.__subclasses__(), key=lambda model: model.__name__)


@pytest.mark.parametrize("model", configurations(), ids=lambda model: model.__name__)
def test_every_field_of_a_configuration_has_a_reader(model):
    """Outside the room, or in a public method or property of the class itself: a check of a value is no reader."""
    if model.__name__ in ("HighResModelConfig", "NoiseSchedulerConfig"):
        return  # whose fields are arguments of classes, see below
    own = [value.fget if isinstance(value, property) else value for name, value in vars(model).items() if name[0] != "_"]
    sources = [f.read_text() for f in PACKAGE.rglob("*.py") if f.parent.name != "config"]
    sources += [inspect.getsource(value) for value in own if inspect.isfunction(value)]
    if model.__name__ == "BridgeConfig":
        sources = [(PACKAGE / "pipelines" / name).read_text() for name in ("bridge_plan.py", "pipeline_atlas.py")]
    for field in model.model_fields:
        assert any(f".{field}" in source or f'"{field}"' in source for source in sources), field


def test_every_field_of_the_facades_is_an_argument():
    from atlas_diffusers.config import HighResModelConfig, NoiseSchedulerConfig
    from atlas_diffusers.originals.high_res import OWN

    unet = set(inspect.signature(atlas_diffusers.AtlasUNet2DModel.__init__).parameters)
    high_res = (PACKAGE / "originals" / "high_res.py").read_text()
    for field in HighResModelConfig.model_fields:
        assert field in unet or (field in OWN and f"config.{field}" in high_res), field
    classes = [getattr(atlas_diffusers, name) for name in atlas_diffusers.SCHEDULERS]
    options = {option for cls in classes for option in inspect.signature(cls.__init__).parameters}
    step = set(inspect.signature(atlas_diffusers.AtlasDDIMScheduler.step).parameters)
    fixed = {"sample_padding_threshold", "sample_padding_norm"}  # kept for old files, only their defaults are allowed
    assert set(NoiseSchedulerConfig.model_fields) <= options | step | fixed


def test_every_scheduler_option_has_a_reader():
    from atlas_diffusers.schedules.time_grid import GRID_OF_OPTION

    rooms = PACKAGE / "schedulers", PACKAGE / "schedules"
    source = "\n".join(f.read_text() for room in rooms for f in room.rglob("*.py"))
    for name in atlas_diffusers.SCHEDULERS:
        for option in list(inspect.signature(getattr(atlas_diffusers, name).__init__).parameters)[1:]:
            read = f"c.{option}" in source or f"config.{option}" in source or f'("{option}"' in source
            assert read or option in GRID_OF_OPTION, option


def test_modules_import_alone():
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":
            importlib.import_module(".".join(p for p in parts if p != "__init__"))


def test_every_parameter_has_a_type():
    bare = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                extra = [each for each in (given.vararg, given.kwarg) if each is not None]
                for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, *extra):
                    if each.annotation is None and each.arg not in ("self", "cls"):
                        bare.append(f"{file.relative_to(PACKAGE)}:{node.lineno} {node.name}({each.arg})")
    assert not bare
