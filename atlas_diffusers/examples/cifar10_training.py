"""Train on CIFAR-10: python -m atlas_diffusers.examples.cifar10_training --data-root FOLDER"""

from .training_pipeline import train_command

if __name__ == "__main__":
    train_command("experiment:cifar10", __doc__)
