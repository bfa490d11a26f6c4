"""Train on LSUN at 256 pixels: python -m atlas_diffusers.examples.lsun256_training --data-root FOLDER"""

from .training_pipeline import train_command

if __name__ == "__main__":
    train_command("experiment:lsun256", __doc__)
