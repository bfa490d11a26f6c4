"""Train on CelebA-HQ at 1024 pixels: python -m atlas_diffusers.examples.celeba1024_training --data-root FOLDER"""

from .training_pipeline import train_command

if __name__ == "__main__":
    train_command("experiment:celeba1024", __doc__)
