"""Six pictures of the embedded pipeline: python -m atlas_diffusers.examples.basic_sampling [OUTPUT.png]"""

import sys
from typing import Any

from ..easy_api import create_sampler
from ..pictures import labelled_grid

PROMPTS = ["red heart", "panda face", "slice of pizza", "sunflower", "frog face", "grinning face"]


def main(output: str = "basic-sampling.png") -> None:
    """Write one sheet."""
    sampler = create_sampler("atlas-emoji")
    pictures: Any = sampler.generate(PROMPTS, timesteps=10, seed=0, output_type="pil")
    labelled_grid(pictures, PROMPTS, columns=3).save(output)
    print(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
