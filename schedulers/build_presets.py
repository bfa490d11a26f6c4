"""
Writes ``schedulers/NAME/scheduler_config.json`` for every preset of the table below: ``python schedulers/build_presets.py``.

A preset says what the table says and leaves the rest at its class's defaults. It holds the name of its beta schedule, not the
betas; Diffusers' own classes refuse a name that they do not know.
"""

import argparse
import json
from pathlib import Path

import atlas_diffusers

CLASSES = {
    "ddim": "AtlasDDIMScheduler",
    "pndm": "AtlasPNDMScheduler",
    "euler": "AtlasEulerScheduler",
    "euler-ancestral": "AtlasEulerAncestralScheduler",
    "heun": "AtlasHeunScheduler",
    "multistep": "AtlasMultistepScheduler",
}
BETA_SCHEDULES = ("linear", "scaled_linear", "cosine", "quadratic", "sigmoid", "exponential", "laplace", "karras")
COMMON = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "clip_sample": False}
DDPM = {**COMMON, "beta_start": 0.0001, "beta_end": 0.02, "timestep_spacing": "trailing"}
STABLE_DIFFUSION = {**COMMON, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RELEASED = {**STABLE_DIFFUSION, "timestep_spacing": "leading", "steps_offset": 1}
ZERO_SNR = {
    **STABLE_DIFFUSION,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}

# family of presets: its options, and its samplers with what they add; a preset's name is family-sampler
FAMILIES = {
    # even in log-SNR, since Heun's correction ruins the long first step of a schedule that ends at σ̂ = 20,000 (cosine)
    **{
        beta: (
            {**DDPM, "beta_schedule": beta},
            {"ddim": {}, "euler": {}, "heun": {"use_exponential_sigmas": True}, "multistep": {}},
        )
        for beta in BETA_SCHEDULES
    },
    "stable-diffusion-1.5": (
        RELEASED,
        {
            "ddim": {"set_alpha_to_one": False},
            "pndm": {"set_alpha_to_one": False, "skip_prk_steps": True},
            "euler": {},
            "euler-ancestral": {},
            "heun": {},
            "multistep": {},
        },
    ),
    "sdxl": (RELEASED, {"euler": {}, "euler-ancestral": {}, "ddim": {"set_alpha_to_one": False}, "heun": {}, "multistep": {}}),
    "zero-snr-v-prediction": (ZERO_SNR, {"ddim": {}, "euler": {}, "multistep": {}}),
}


def presets() -> dict[str, tuple[str, dict]]:
    """Class name and options of every preset, by name."""
    return {
        f"{family}-{sampler}": (CLASSES[sampler], {**options, **extra})
        for family, (options, samplers) in FAMILIES.items()
        for sampler, extra in samplers.items()
    }


def to_json(class_name: str, options: dict) -> str:
    """A preset's file; the class checks the options, and names the cosine schedule as Diffusers does."""
    config = getattr(atlas_diffusers, class_name)(**options).config
    return json.dumps({"_class_name": class_name, **{name: config[name] for name in sorted(options)}}, indent=2) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent, help="where to write (default: here)")
    folder = parser.parse_args(argv).folder
    for name, (class_name, options) in presets().items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "scheduler_config.json").write_text(to_json(class_name, options), encoding="utf-8")


if __name__ == "__main__":
    main()
