import copy
import json
import shutil
import subprocess
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline, build_tiny_unet, seeded
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from stock_pipelines import build_stock_pipeline, swap

import atlas_diffusers
from atlas_diffusers.cli import main
from atlas_diffusers.conditioning import build_text_encoder, build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    build_tiny_pipeline().save_pretrained(folder)
    return str(folder)


def test_one_picture_equals_the_pipelines(folder, tmp_path, capsys):
    output = tmp_path / "heart.png"
    arguments = ["--model", folder, "--steps", "4", "--guidance", "2", "--seed", "5"]
    assert main(["generate", "red heart", "-o", str(output), *arguments]) == 0
    expected = build_tiny_pipeline()("red heart", num_inference_steps=4, guidance_scale=2.0, generator=[seeded(5)]).images[0]
    np.testing.assert_array_equal(np.array(Image.open(output)), np.array(expected))
    assert capsys.readouterr().out.strip() == str(output.resolve())


def test_several_pictures_are_laid_out_in_the_order_of_the_prompts(folder, tmp_path):
    output = tmp_path / "grid.png"
    assert main(["generate", "red heart", "blue star", "--count", "2", "-o", str(output), "--model", folder]) == 0
    sheet = np.array(Image.open(output))
    prompts = ["red heart"] * 2 + ["blue star"] * 2
    expected = build_tiny_pipeline()(prompts, generator=[seeded(i) for i in range(4)]).images
    for i, image in enumerate(expected):
        y, x = 8 + i // 2 * (160 + 8 + 22), 8 + i % 2 * (160 + 8)
        np.testing.assert_array_equal(sheet[y : y + 160 : 20, x : x + 160 : 20], np.array(image))


def test_a_negative_prompt_is_the_pipelines(folder, tmp_path):
    output, arguments = tmp_path / "heart.png", ["--steps", "3", "--guidance", "4", "--seed", "5", "--negative", "blue star"]
    assert main(["generate", "red heart", "-o", str(output), "--model", folder, *arguments]) == 0
    call = {"num_inference_steps": 3, "guidance_scale": 4.0}
    expected, without = (
        np.array(build_tiny_pipeline()("red heart", **call, **negative, generator=[seeded(5)]).images[0])
        for negative in ({"negative_prompt": "blue star"}, {})
    )
    found = np.array(Image.open(output))
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, without)


def test_a_style_is_a_part_of_the_prompt(tmp_path):
    tokenizer = build_tokenizer(["red heart, twemoji style", "red heart, flat style"], 600, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = build_text_encoder(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    build_tiny_pipeline(tokenizer=tokenizer, text_encoder=text_encoder).save_pretrained(tmp_path / "styled")
    arguments = ["--model", str(tmp_path / "styled"), "--steps", "2", "--seed", "5"]
    assert main(["generate", "red heart", "--style", "flat", "-o", str(tmp_path / "a.png"), *arguments]) == 0
    assert main(["generate", "red heart, flat style", "-o", str(tmp_path / "b.png"), *arguments]) == 0
    assert main(["generate", "red heart", "-o", str(tmp_path / "c.png"), *arguments]) == 0
    styled, written, plain = (np.array(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    np.testing.assert_array_equal(styled, written)
    assert not np.array_equal(styled, plain)


@pytest.mark.parametrize("name", [name for name in dir(diffusers) if name.endswith("Scheduler")])
def test_every_scheduler_of_diffusers_samples_or_says_why_not(name, folder, tmp_path, capsys):
    output = ["-o", str(tmp_path / "a.png")]
    status = main(["generate", "red heart", *output, "--model", folder, "--scheduler", name, "--steps", "4"])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("atlas-diffusers: ")]
    assert (status, len(error), (tmp_path / "a.png").exists()) in ((0, 0, True), (2, 1, False))


@pytest.mark.parametrize("name, steps", [("ddpm", 3), ("EulerDiscreteScheduler", 3)])
def test_scheduler_is_swapped(folder, tmp_path, name, steps):
    outputs = [tmp_path / "a.png", tmp_path / "b.png"]
    for output, extra in zip(outputs, ([], ["--scheduler", name])):
        assert main(["generate", "red heart", "-o", str(output), "--model", folder, "--steps", str(steps), *extra]) == 0
    a, b = (np.array(Image.open(output)) for output in outputs)
    assert a.shape == b.shape and not np.array_equal(a, b)


BAD = [
    (["--model", "no-such"], "no pipeline 'no-such'"),
    (["--steps", "0"], "--steps 0"),
    (["--count", "0"], "--count 0"),
    (["--style", "manga"], "--style 'manga' is unknown; allowed are noto, noto-v1, fluent, flat, twemoji, fxemoji"),
    (["--style", "flat"], "was not trained on the pictograms"),
    (["--scheduler", "bogus"], "scheduler 'bogus' is unknown; allowed are ['cosinenoise', 'ddim', 'ddpm'"),
    (["--device", "banana"], "--device banana: "),
    (["--device", "cuda:77"], "--device cuda:77: "),
    (["--scheduler", "RePaintScheduler"], "RePaintScheduler cannot sample with this pipeline: RePaintScheduler.step() missing"),
    (["--scheduler", "KarrasVeScheduler"], "KarrasVeScheduler cannot sample with this pipeline"),
    (["-o", "picture.txt"], "picture.txt: expected a picture file name"),
    (["-o", "picture.psd"], "picture.psd: expected a picture file name"),
    (["-o", "no-such-folder/a.png"], "folder no-such-folder does not exist"),
]


@pytest.mark.parametrize("extra, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line_and_status_2(folder, tmp_path, capsys, extra, message):
    arguments = ["generate", "red heart", "-o", str(tmp_path / "x.png"), "--model", folder, *extra]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_damaged_weights_are_one_line_and_status_2(folder, tmp_path, capfd):
    damaged = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert main(["generate", "red heart", "-o", str(tmp_path / "x.png"), "--model", str(damaged)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("atlas-diffusers: ") and "diffusion_pytorch_model.safetensors" in error and error.count("\n") == 1


USAGE = [
    [], ["bogus"], ["generate", "a", "--steps", "many"],
    ["generate", "a\udcff"], ["generate", "a", "--negative", "\udcff"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", USAGE, ids=ascii)
def test_wrong_usage_is_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0 and 'atlas-diffusers generate "red heart" -o heart.png' in capsys.readouterr().out


# ---------------------------------------------------------------------- adapters, sizes, files, and making a picture again


def paint(folder, output, *arguments):
    assert main(["generate", *arguments, "-o", str(output), "--model", folder, "--steps", "2"]) == 0
    return output


def pixels(file):
    return np.array(Image.open(file))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two runs' output folders with adapters in Diffusers' format."""
    folders = []
    for number in range(2):
        pipeline = build_tiny_pipeline()
        unet = copy.deepcopy(pipeline.unet)
        with torch.random.fork_rng():
            unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        for index, (name, p) in enumerate(unet.named_parameters()):
            if "lora_" in name:
                p.data.copy_(torch.randn(p.shape, generator=seeded(10 * number + index)))
        folder = tmp_path_factory.mktemp("run")
        type(pipeline).save_lora_weights(folder / "lora", unet_lora_layers=get_peft_model_state_dict(unet))
        folders.append(folder)
    return folders


def test_adapters_with_scales_are_the_pipelines(folder, adapters, tmp_path):
    found = pixels(paint(folder, tmp_path / "a.png", "red heart", "--lora", f"{adapters[0]}:0.5", "--lora", str(adapters[1])))
    pipeline = build_tiny_pipeline()
    with torch.random.fork_rng():
        for number, adapter in enumerate(adapters):
            pipeline.load_lora_weights(adapter / "lora", adapter_name=f"a{number}")
    pipeline.set_adapters(["a0", "a1"], [0.5, 1.0])
    expected = np.array(pipeline("red heart", num_inference_steps=2, generator=[seeded()]).images[0])
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, pixels(paint(folder, tmp_path / "b.png", "red heart")))


def test_adapters_of_another_architecture_are_named(adapters, tmp_path, capsys):
    wide = build_tiny_unet(base_channels=16, cross_attention_levels=(1,), cross_attention_dim=16, addition_embed_type="text")
    build_tiny_pipeline(unet=wide).save_pretrained(tmp_path / "wide")
    arguments = ["generate", "a", "--model", str(tmp_path / "wide"), "-o", str(tmp_path / "a.png")]
    assert main([*arguments, "--lora", str(adapters[0])]) == 2
    error = capsys.readouterr().err
    assert "are of another architecture than this AtlasPipeline: unet." in error
    assert error.count("for a weight") == 3 and "more" in error
    assert main([*arguments, "--lora", str(tmp_path / "nothing.safetensors")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err


def test_sizes_and_enlargement(folder, tmp_path):
    plain = pixels(paint(folder, tmp_path / "a.png", "red heart", "--height", "16", "--width", "8"))
    assert plain.shape == (16, 8, 3)
    near = pixels(paint(folder, tmp_path / "b.png", "red heart", "--height", "16", "--width", "8", "--scale", "3"))
    np.testing.assert_array_equal(near, plain.repeat(3, 0).repeat(3, 1))
    options = ["--height", "16", "--width", "8", "--scale", "3", "--resampling", "lanczos"]
    smooth = pixels(paint(folder, tmp_path / "c.png", "red heart", *options))
    np.testing.assert_array_equal(smooth, np.array(Image.fromarray(plain).resize((24, 48), Image.Resampling.LANCZOS)))


def test_a_folder_gets_a_file_a_picture_and_each_is_made_again(folder, tmp_path):
    target = paint(folder, tmp_path / "pictures", "red heart", "blue star", "--count", "2", "--negative", "frog", "--seed", "3")
    files = sorted(target.iterdir())
    assert [file.name for file in files] == ["000-red-heart.png", "001-red-heart.png", "002-blue-star.png", "003-blue-star.png"]
    again = tmp_path / "again.png"
    assert main(["generate", "--from-png", str(files[3]), "-o", str(again)]) == 0
    assert again.read_bytes() == files[3].read_bytes()
    settings = json.loads(Image.open(again).info["atlas-diffusers"])
    expected = {
        "prompts": ["blue star"], "seed": 6, "sampler": "AtlasDDIMScheduler", "steps": 2, "negative": "frog",
        "version": atlas_diffusers.__version__,
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    assert main(["generate", "--from-png", str(files[3]), "--seed", "7", "-o", str(again)]) == 0
    assert not np.array_equal(pixels(again), pixels(files[3]))


def test_a_sheet_has_a_row_a_prompt_and_is_made_again(folder, tmp_path):
    sheet = paint(folder, tmp_path / "sheet.png", "red heart", "blue star", "心", "--count", "2")
    assert Image.open(sheet).size == (2 * 168 + 8, 3 * 190 + 8)
    again = tmp_path / "again.png"
    assert main(["generate", "--from-png", str(sheet), "-o", str(again)]) == 0
    assert again.read_bytes() == sheet.read_bytes()


def test_a_picture_to_start_from(folder, tmp_path, capsys):
    start = tmp_path / "start.png"
    Image.new("RGB", (8, 8), (200, 40, 40)).save(start)
    found = paint(folder, tmp_path / "a.png", "red heart", "--image", str(start), "--strength", "0.5")
    expected = build_tiny_pipeline()(
        ["red heart"], image=Image.open(start), strength=0.5, num_inference_steps=2, generator=[seeded()]
    ).images[0]
    np.testing.assert_array_equal(pixels(found), np.array(expected))
    Image.new("RGB", (8, 8), "blue").save(start)
    assert main(["generate", "--from-png", str(found), "-o", str(tmp_path / "b.png")]) == 2
    assert "is not the picture that" in capsys.readouterr().err


def test_the_output_of_a_run_stands_for_its_pipeline(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "run" / "pipeline")
    found = paint(str(tmp_path / "run"), tmp_path / "a.png", "red heart")
    np.testing.assert_array_equal(pixels(found), pixels(paint(folder, tmp_path / "b.png", "red heart")))


def test_pipelines_of_diffusers_paint_too(tmp_path):
    build_stock_pipeline("text2img").save_pretrained(tmp_path / "stock")
    options = ["--height", "64", "--width", "64", "--guidance", "2", "--negative", "frog", "--scheduler", "euler"]
    found = pixels(paint(str(tmp_path / "stock"), tmp_path / "a.png", "a red heart", *options))
    stock = swap(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "stock"), "AtlasEulerScheduler")
    stock.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "guidance_scale": 2.0, "negative_prompt": ["frog"], "num_inference_steps": 2}
    np.testing.assert_array_equal(found, np.array(stock(["a red heart"], generator=[seeded()], **call).images[0]))


def test_settings_without_effect_are_named(folder, tmp_path, capsys):
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    for extra, message in (
        ([], "give a PROMPT"),
        (["a", "--strength", "0.5"], "--strength needs --image"),
        (["a", "--resampling", "lanczos"], "needs --scale"),
        (["--from-png", str(plain)], "does not say how it was made"),
        (["a", "--lora", str(tmp_path)], "the folder has no pytorch_lora_weights.safetensors"),
    ):
        assert main(["generate", *extra, "--model", folder, "-o", str(tmp_path / "x.png")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x.png").exists()


# ---------------------------------------------------------------------- version, completion


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"atlas-diffusers {atlas_diffusers.__version__}\n"


def test_bash_completes_commands_and_options(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)

    def completed(*words):
        listed = " ".join(f"'{word}'" for word in words)
        code = f"source {script}; COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _atlas_diffusers; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert completed("atlas-diffusers", "gen") == ["generate"]
    assert completed("atlas-diffusers", "generate", "a", "--neg") == ["--negative"]
    assert set(completed("atlas-diffusers", "recipes", "")) >= {"list", "show", "copy"}


@pytest.mark.parametrize("shell, line", [("zsh", "bashcompinit"), ("fish", "seen_subcommand_from generate' -l lora")])
def test_other_shells(shell, line, capsys):
    assert main(["completion", shell]) == 0
    assert line in capsys.readouterr().out
