"""Train on FFHQ at 128 pixels: python -m atlas_diffusers.examples.ffhq128_training --data-root FOLDER"""

from .training_pipeline import train_command

if __name__ == "__main__":
    train_command("experiment:ffhq128", __doc__)
