"""Prompts, encoded once and given to the sampler of the original toolkit: python -m atlas_diffusers.examples.conditioning"""

import sys
from typing import cast

import torch

from ..conditioning import CLIPConditioningInterface
from ..originals import AdvancedHierarchicalDiffusionSampler
from ..pictures.sheets import labelled_grid, to_pictures
from ..pipelines import AtlasPipeline
from ..schedules import noise_coefficients

PROMPTS = ["red heart", "sunflower", "frog face"]


def main(output: str = "conditioning.png") -> None:
    """Write one sheet."""
    pipeline = AtlasPipeline.from_pretrained("atlas-emoji")
    clip = CLIPConditioningInterface(text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer)
    alpha_bars = pipeline.scheduler.alphas_cumprod

    def noise_schedule(t: float) -> float:
        return alpha_bars[round(t * (len(alpha_bars) - 1))].item()

    def predict_noise(x: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        alpha_bar = noise_schedule(t[0].item())
        a, b = noise_coefficients("v_prediction", alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
        return a * x + b * pipeline.unet(x, (len(alpha_bars) - 1) * t, states).sample

    sampler = AdvancedHierarchicalDiffusionSampler(predict_noise, noise_schedule)
    states = clip.encode_text(PROMPTS).hidden_states
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    samples = sampler.sample((len(PROMPTS), 3, 32, 32), 20, states, generator=generators)
    labelled_grid(to_pictures(cast(torch.Tensor, samples)), PROMPTS).save(output)
    print(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
