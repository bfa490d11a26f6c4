"""Train a pipeline from a recipe.

    accelerate launch training/train.py --config training/recipes/emoji.yaml
    accelerate launch training/train.py --config training/recipes/emoji.yaml --max_steps 200 --dataset.resolution 32
    accelerate launch training/train.py --config experiment:ffhq128 --dataset.root my-pictures
"""

import sys

from atlas_diffusers.training.script import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
