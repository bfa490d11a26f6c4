"""Train on ImageNet at 64 pixels: python -m atlas_diffusers.examples.imagenet64_training --data-root FOLDER"""

from .training_pipeline import train_command

if __name__ == "__main__":
    train_command("experiment:imagenet64", __doc__)
