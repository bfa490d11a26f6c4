"""Train low-rank adapters of a pipeline from a recipe; the pipeline itself stays as it is.

    accelerate launch training/train_lora.py --config training/recipes/fluent-lora.yaml
    accelerate launch training/train_lora.py --config my.yaml --init_from my-pipeline --lora.rank 16
"""

import sys

from atlas_diffusers.training.script import main

if __name__ == "__main__":
    sys.exit(main(__doc__, {"lora": {}}))
