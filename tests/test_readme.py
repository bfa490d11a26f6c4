"""The README's Python blocks run, and its first two commands are the Makefile's."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, WanPipeline
from flow_pipelines import KINDS, build_flow_pipeline
from stock_pipelines import build_stock_pipeline

from atlas_diffusers.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_lines_are_the_two_commands():
    commands = [line.split("#")[0].strip() for line in README.split("```bash\n")[1].split("```")[0].splitlines()]
    assert commands == ["make demo", "make test"]
    assert README.index("make demo") < 60


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schedulers").symlink_to(ROOT / "schedulers")
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README.md", "exec"), scope)
    assert (tmp_path / "heart.png").is_file()
    assert scope["pipeline"].scheduler.config.use_karras_sigmas


def tiny_stable_diffusion(folder):
    """``from_pretrained`` of a tiny pipeline."""
    from_pretrained = StableDiffusionPipeline.from_pretrained

    def tiny(name, **options):
        assert name == "stable-diffusion-v1-5/stable-diffusion-v1-5"
        build_stock_pipeline("text2img").save_pretrained(folder)
        return from_pretrained(folder, **options)

    return tiny


def tiny_flow(kind: str):
    """``from_pretrained`` of a tiny pipeline, which takes a prompt for its embeddings and ends with latents."""

    def tiny(name, **options):
        pipeline = build_flow_pipeline(kind)

        class Prompted(type(pipeline)):
            def __call__(self, prompt, **options):
                return super().__call__(**KINDS[kind].inputs(), **options, output_type="latent")

        pipeline.__class__ = Prompted
        return pipeline

    return tiny


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_python_blocks_of_the_pages_run(page, tmp_path, monkeypatch):
    """In order, with what the blocks before them made; a pipeline of the hub is a tiny one of the same class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", tiny_stable_diffusion(tmp_path / "stock"))
    monkeypatch.setattr(FluxPipeline, "from_pretrained", tiny_flow("Flux"))
    monkeypatch.setattr(WanPipeline, "from_pretrained", tiny_flow("Wan 2.1"))
    scope: dict = {}
    with torch.random.fork_rng():
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            exec(compile(block, page.name, "exec"), scope)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.stem)
def test_commands_of_the_pages_exist(page):
    """Scripts are there, and every command of ours parses."""
    parser = build_parser()
    text = page.read_text(encoding="utf-8").replace("\\\n", "")
    for line in re.findall(r"^(?:atlas-diffusers|accelerate launch) .*$", text, re.M):
        words = shlex.split(line.split(" #")[0])
        if words[0] == "accelerate":
            named = [word for word in words if word.startswith("training/")]
            assert named and all((ROOT / word).is_file() for word in named), line
        else:
            parser.parse_args(words[1:])


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_embedded_pipeline_paints_a_red_heart():
    from atlas_diffusers import AtlasPipeline, load_emoji
    from atlas_diffusers.metrics import nearest_neighbours
    from atlas_diffusers.metrics.retrieval import to_tensor

    pipeline = AtlasPipeline.from_pretrained("atlas-emoji")
    image = pipeline("red heart", generator=[torch.Generator().manual_seed(0)]).images
    emoji = load_emoji("train", ["Smileys & Emotion"])
    _, nearest = nearest_neighbours(to_tensor(image), to_tensor(emoji["image"]))
    assert emoji[int(nearest)]["text"] == "red heart"


def test_the_embedded_pipeline_is_small():
    folder = ROOT / "atlas_diffusers" / "pretrained" / "atlas-emoji"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 16e6
