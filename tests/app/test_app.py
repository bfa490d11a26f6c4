"""What lies behind the tabs of the page, without a browser."""

import csv
import json
import re
import signal
import socket
import sys
import threading
import time

import diffusers
import pytest
import torch
from conftest import build_tiny_pipeline, build_tiny_unet
from PIL import Image
from stock_pipelines import build_stock_pipeline

gr = pytest.importorskip("gradio", reason="the extra `app` is not installed")

from atlas_diffusers.app.answers import answered  # noqa: E402
from atlas_diffusers.app.model import ANY, OWN, Model, as_they_come  # noqa: E402
from atlas_diffusers.app.page import open_page  # noqa: E402
from atlas_diffusers.app.runs import Run, Runs  # noqa: E402
from atlas_diffusers.app.scratch import new_folder, scratch_folder  # noqa: E402
from atlas_diffusers.app.tab_bridge import FOLDER, UPLOADS, bridge, read_references  # noqa: E402
from atlas_diffusers.app.tab_compare import compare, read_steps  # noqa: E402
from atlas_diffusers.app.tab_generate import generate  # noqa: E402
from atlas_diffusers.app.tab_pictures import look, progress  # noqa: E402
from atlas_diffusers.app.tab_schedules import AS_IT_IS, schedules  # noqa: E402
from atlas_diffusers.cli import main  # noqa: E402
from atlas_diffusers.cli.pipelines import load_pipeline  # noqa: E402
from atlas_diffusers.pipelines.watching import pictures_of, watched  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return Model(build_tiny_pipeline(), "tiny")


@pytest.fixture
def scratch():
    with scratch_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    for i in range(12):
        Image.new("RGB", (12, 10), (20 * i, 0, 90)).save(folder / f"{i:02d}.png")
    return folder


def last(steps):
    return list(steps)[-1]


def pixels(gallery):
    return [picture.tobytes() for picture, _ in gallery]


# ------------------------------------------------------------------ generate


def test_pictures_are_those_of_the_pipeline(model):
    shown = list(generate(model, "red heart", "", ANY, OWN, 3, 2.0, 2, 5))
    expected = model.pipeline(
        ["red heart"] * 2, num_inference_steps=3, guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
    ).images  # fmt: skip
    assert pixels(shown[-1][0]) == [picture.tobytes() for picture in expected]
    assert [told for _, told in shown] == [f"network call {i}, 3 steps" for i in (1, 2, 3)] + ["3 steps, 3 network calls"]
    assert [caption for _, caption in shown[-1][0]] == ["red heart, seed 5", "red heart, seed 6"]


def test_predictions_are_those_of_the_data(float64):
    """The network's prediction, turned to data, of the samples that a callback sees."""
    pipeline = build_tiny_pipeline()
    seen, samples = [], [torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))]

    def after(pipe, index, t, tensors):
        samples.append(tensors["latents"].clone())
        return {}

    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent", "latents": samples[0].clone()}
    watched(pipeline, pipeline.scheduler, seen.append)("red heart", **call, callback_on_step_end=after)
    pipeline.scheduler.set_timesteps(3)
    states, _ = pipeline.encode_prompt("red heart", do_classifier_free_guidance=False)
    with torch.no_grad():
        for x, t, data in zip(samples, pipeline.scheduler.timesteps, seen, strict=False):
            velocity = pipeline.unet(x, t, encoder_hidden_states=states, return_dict=False)[0]
            alpha = pipeline.scheduler.alphas_cumprod[t].double().sqrt()
            torch.testing.assert_close(data, alpha * x - (1 - alpha**2).sqrt() * velocity, atol=1e-6, rtol=1e-6)
    assert len(seen) == 3


def test_two_at_once_get_what_each_gets_alone(model):
    calls = [("red heart", OWN, 0), ("blue star", "Heun", 9), ("green leaf", "DDPM", 3)]

    def run(prompt, sampler, seed):
        return pixels(last(generate(model, prompt, "", ANY, sampler, 6, 1.5, 1, seed))[0])

    alone, together = [run(*call) for call in calls], {}
    threads = [threading.Thread(target=lambda c=call: together.update({c: run(*c)})) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[call] for call in calls] == alone


def test_who_stops_asking_ends_the_call(model):
    before = threading.active_count()
    steps = generate(model, "red heart", "", ANY, OWN, 50, 1.0, 1, 0)
    next(steps)
    steps.close()
    assert threading.active_count() == before


def test_stock_pipelines_are_watched_too(tmp_path):
    build_stock_pipeline("text2img").save_pretrained(tmp_path / "stock")
    model = Model(load_pipeline(str(tmp_path / "stock")), "stock")
    shown = list(generate(model, "red heart", "", ANY, "Euler", 2, 2.0, 1, 0))
    assert shown[-1][1] == "2 steps, 2 network calls" and len(shown) == 3
    assert model.pipeline.scheduler.__class__.__name__ != "AtlasEulerScheduler"


def test_latents_without_a_decoder_are_not_shown(model):
    assert pictures_of(model.pipeline, torch.zeros(1, 16, 64)) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": "x" * 10_000}, "the prompt has 10,000 characters; allowed are 1,000"),
        ({"negative": "x" * 1_001}, "the negative prompt has 1,001 characters"),
        ({"style": "cubist"}, "style 'cubist' is unknown"),
        ({"sampler": "magic"}, "sampler 'magic' is unknown"),
        ({"steps": 0}, "0 steps; allowed are 1 to 200"),
        ({"count": 1000}, "1000 pictures; allowed are 1 to 64"),
        ({"seed": -1}, "seed -1; allowed are 0 to"),
    ],
)
def test_bad_input_is_named(model, changes, message):
    given = {"prompt": "red heart", "negative": "", "style": ANY, "sampler": OWN, "steps": 2, "guidance": 1.0}
    given |= {"count": 1, "seed": 0}
    with pytest.raises(ValueError, match=re.escape(message)):
        last(generate(model, **{**given, **changes}))


def test_mistakes_become_answers_of_the_page():
    def fails():
        raise ValueError("first\nsecond")

    def fails_later():
        yield 1
        raise OSError("gone")

    with pytest.raises(gr.Error, match="first second"):
        answered(fails)()
    steps = answered(fails_later)()
    assert next(steps) == 1
    with pytest.raises(gr.Error, match="gone"):
        next(steps)


def test_results_come_last():
    assert list(as_they_come(lambda show: [show(i) for i in (1, 2)] and "end")) == [1, 2, "end"]


def test_classes_take_the_place_of_prompts():
    pipeline = build_tiny_pipeline(unet=build_tiny_unet(num_class_embeds=4), text_encoder=None, tokenizer=None)
    labelled = Model(pipeline, "classes")
    assert labelled.call("3", ANY, 2) == {"class_labels": [3, 3]}
    assert labelled.call("", ANY, 2) == {"num_images_per_prompt": 2}
    with pytest.raises(ValueError, match="expected a number below 4, got '4'"):
        labelled.call("4", ANY, 1)


# ------------------------------------------------------------------ compare, schedules, bridge


def test_comparison_measures_against_the_finest(model, scratch):
    rows = list(compare(model, "red heart", [OWN, "DDIM", "Heun"], "2, 6 2", 1.0, 0))
    [(sheet, caption)], table, told, png, file = rows[-1]
    assert [row[:2] for row in table] == [[name, count] for name in (OWN, "DDIM", "Heun") for count in (2, 6)]
    assert [row[2] for row in table] == [2, 6, 2, 6, 3, 11]
    by_cell = {(name, steps): distance for name, steps, *_, distance in table}
    # the pipeline's own scheduler is DDIM
    assert by_cell[OWN, 6] == by_cell["DDIM", 6] == 0 and by_cell[OWN, 2] == by_cell["DDIM", 2] > 0 and by_cell["Heun", 6] > 0
    assert told == f"6 of 6; distance to {OWN} at 6 steps, same noise"
    with open(file, newline="") as handle:
        assert [row[:2] for row in list(csv.reader(handle))[1:]] == [[name, str(steps)] for name, steps, *_ in table]
    assert Image.open(png).size == sheet.size and caption == "red heart, seed 0"
    assert [row[3:] for row in rows][:-1] == [(None, None)] * 5


@pytest.mark.parametrize("text, message", [("", "missing"), ("5, x", "steps x;"), ("0", "steps 0;"), ("5000", "steps 5000;")])
def test_steps_are_checked(text, message):
    with pytest.raises(ValueError, match=message):
        read_steps(text)


def test_schedules_change_with_the_options(model):
    names = ["ddim", "euler:cosine", "tiny", "HeunDiscreteScheduler"]
    figure, told = schedules(model, names, 7, AS_IT_IS, "trailing", AS_IT_IS, False)
    assert told == "4 drawn"
    drawn = figure.axes[0].get_lines()
    reference = diffusers.HeunDiscreteScheduler().betas
    assert torch.allclose(torch.as_tensor(drawn[3].get_ydata()), reference, atol=1e-7)
    changed, _ = schedules(model, ["ddim"], 7, "cosine", AS_IT_IS, "Karras", True)
    betas = [torch.as_tensor(line.get_ydata()) for line in (changed.axes[0].get_lines()[0], drawn[0])]
    assert not torch.allclose(*betas)
    for bad in (["nonsense"], [], ["schedulers"]):
        with pytest.raises(ValueError):
            schedules(model, bad, 7, AS_IT_IS, AS_IT_IS, AS_IT_IS, False)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler has no option rescale_betas_zero_snr"):
        schedules(model, ["HeunDiscreteScheduler"], 7, AS_IT_IS, AS_IT_IS, AS_IT_IS, True)


def test_the_bridge_saves_calls_of_the_network(model, pictures):
    shown = list(bridge(model, True, FOLDER, str(pictures), None, "red heart", 2, 6, 4, 0))
    alone, coupled, figure, told = shown[-1]
    assert pixels(alone) == pixels(last(generate(model, "red heart", "", ANY, OWN, 6, model.defaults[1], 4, 0))[0])
    assert pixels(coupled) != pixels(alone)
    calls = re.fullmatch(r"12 references; (\d) network calls in place of 6", told)
    assert calls and int(calls[1]) == 6 - len(figure.axes[0].get_lines()[0].get_ydata())


def test_references_are_bounded_and_read_safely(model, pictures, tmp_path):
    files = [str(file) for file in sorted(pictures.glob("*.png"))]
    uploaded = read_references(model, UPLOADS, "", files, local=False)
    assert torch.equal(uploaded.values, read_references(model, FOLDER, str(pictures), None, local=True).values)
    with pytest.raises(ValueError, match="reads no folders"):
        read_references(model, FOLDER, str(pictures), None, local=False)
    with pytest.raises(ValueError, match="3 pictures; a bridge needs at least 8"):
        read_references(model, UPLOADS, "", files[:3], local=True)
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match="no.png cannot be read"):
        read_references(model, UPLOADS, "", [*files, str(tmp_path / "no.png")], local=True)


# ------------------------------------------------------------------ own pictures

TINY = {
    "model": {"base_channels": 8, "channel_mult": [1], "attention_levels": [], "norm_num_groups": 4, "num_res_blocks": 1},
    "dataset": {"resolution": 8, "caption_column": None}, "text_encoder": None, "batch_size": 2, "checkpoint_interval": 100_000,
    "log_interval": 1, "warmup_steps": 0, "sample_interval": 1, "sample_steps": 1,
}  # fmt: skip


def test_a_run_stops_calmly_and_goes_on(pictures, tmp_path, scratch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told, text = look(str(pictures), "auto", 0)
    assert told.startswith("12 pictures, 0 with captions") and "resolution: 32" in text
    data = {**TINY, "output_dir": str(tmp_path / "out"), "max_steps": 10**6}
    data["dataset"] = {**TINY["dataset"], "root": str(pictures)}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(data))
    with Runs() as runs:
        run = runs.start("page", recipe, tmp_path / "log.txt")
        with pytest.raises(ValueError, match="already running"):
            runs.start("page", recipe, tmp_path / "log.txt")
        while len(run.rows()) < 3:
            assert run.is_running, run.tail()
            time.sleep(0.2)
        status, curves, grids, log = progress(run)
        assert status.startswith("training: step ") and len(curves.axes) == 2 and grids and "step/s" in log
        assert run.stop() == "stopping after this step, with a checkpoint"
        assert run.stop().startswith("already stopping")
        run.end()
        reached = run.rows()[-1]["step"]
        assert run.process.returncode == 128 + signal.SIGTERM
        assert re.fullmatch(rf"stopped; Train goes on from .*checkpoint-{reached}", run.status())
        again = runs.start("page", recipe, tmp_path / "log.txt")  # another process may begin
    assert again.process.returncode is not None


def test_a_page_that_is_closed_leaves_nothing_running(tmp_path, monkeypatch, capsys):
    class Endless(Run):
        def __init__(self, recipe, log):
            import subprocess

            self.log, self.stopping, self.folder = log, False, tmp_path
            self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    monkeypatch.setattr("atlas_diffusers.app.runs.Run", Endless)
    runs = Runs()
    run = runs.start("page", tmp_path / "recipe", tmp_path / "log.txt")
    (tmp_path / "log.txt").write_text("")
    runs.leave("another page")
    assert run.is_running
    runs.leave("page")
    assert run.process.returncode == -signal.SIGTERM
    assert capsys.readouterr().out == "page closed: stopped before the first checkpoint; Train starts anew\n"


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken, gr.Blocks() as page:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"^port {port} of 127.0.0.1 cannot be had, is it in use"):
            open_page(page, "127.0.0.1", port)


def test_temporary_files_go(monkeypatch):
    with scratch_folder() as folder:
        inside = new_folder()
        assert inside.parent == folder
    assert not folder.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [(["-m", "."], "is not a pipeline folder"), (["-m", "no-such-thing"], "no pipeline"), (["--device", "abacus"], "abacus")],
)
def test_the_command_names_what_is_wrong(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["app", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
