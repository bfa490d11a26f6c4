"""Adapters of the embedded pipeline, trained for a few steps: python -m atlas_diffusers.examples.lora [FOLDER [STEPS]]"""

import sys

from ..config import TrainingConfig, validate
from ..pipelines import AtlasPipeline
from ..training import Trainer


def main(folder: str = "outputs/example-lora", steps: str = "20") -> None:
    """Train on pictures of objects, load the adapters, and print how many there are."""
    recipe = {
        "output_dir": folder, "init_from": "atlas-emoji", "text_encoder": None, "lora": {"rank": 4}, "max_steps": int(steps),
        "batch_size": 4, "checkpoint_interval": int(steps), "dataset": {"categories": ["Objects"]},
    }  # fmt: skip
    adapters = Trainer(validate(TrainingConfig, recipe)).train()
    pipeline = AtlasPipeline.from_pretrained("atlas-emoji")
    pipeline.load_lora_weights(str(adapters))
    print(f"{adapters}: {sum(p.numel() for name, p in pipeline.unet.named_parameters() if 'lora' in name)} weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
