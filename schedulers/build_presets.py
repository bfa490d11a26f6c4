"""
Writes ``schedulers/NAME/scheduler_config.json`` for every preset of the table below: ``python schedulers/build_presets.py``.

A preset says what the table says and leaves the rest at its class's defaults. It holds the name of its beta schedule, not the
betas; Diffusers' own classes refuse a name that they do not know.
"""

import argparse
import json
import re
from pathlib import Path

import atlas_diffusers
from atlas_diffusers._registration import NOISE_SCHEDULERS, SAMPLERS


def short(class_name: str) -> str:
    """``euler-ancestral`` for ``AtlasEulerAncestralScheduler``."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "-", class_name[len("Atlas") : -len("Scheduler")]).lower()


CLASSES = {short(name): name for name in SAMPLERS.values()}
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
FLOW = {"num_train_timesteps": 1000, "prediction_type": "flow_prediction"}
FLUX = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
QWEN = {**FLUX, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02, "time_shift_type": "exponential"}
# of the published scheduler_config.json files
FLOWS = {
    "stable-diffusion-3": {**FLOW, "shift": 3.0},
    "flux-dev": {**FLOW, **FLUX, "shift": 3.0, "use_dynamic_shifting": True},
    "flux-schnell": {**FLOW, **FLUX, "shift": 1.0},
    "qwen-image": {**FLOW, **QWEN, "shift": 1.0, "use_dynamic_shifting": True},
    "wan-2.1-720p": {**FLOW, "use_flow_sigmas": True, "shift": 5.0, "flow_shift": 5.0},
    "sana": {**FLOW, "use_flow_sigmas": True, "shift": 3.0, "flow_shift": 3.0},
}

# family of presets: its options, and its samplers with what they add; a preset's name is family-sampler
FAMILIES = {
    # even in log-SNR, since Heun's correction ruins the long first step of a schedule that ends at σ̂ = 20,000 (cosine)
    **{
        beta: (
            {**DDPM, "beta_schedule": beta},
            {"ddim": {}, "euler": {}, "heun": {"use_exponential_sigmas": True}, "multistep": {}},
        )
        for beta in NOISE_SCHEDULERS
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
    **{flow: (options, {"euler": {}, "heun": {}, "multistep": {}}) for flow, options in FLOWS.items()},
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
