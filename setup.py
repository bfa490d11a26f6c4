from pathlib import Path

from setuptools import find_packages, setup

DEV = [
    "scipy>=1.11",
    "pytest>=8",
    "hypothesis>=6.100",
    "ruff>=0.8",
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
    package_data={"atlas_diffusers.pretrained": ["emoji/*", "atlas-*/*.*", "atlas-*/*/*"]},
    install_requires=[
        "torch>=2.4",
        "diffusers>=0.42,<0.43",
        "transformers>=5.0,<6",
        "accelerate>=1.10",
        "peft>=0.18",
        "datasets>=4.0",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "pydantic>=2.7",
        "PyYAML>=6.0",
        "Pillow>=10.4",
        "numpy>=1.26",
        "tqdm>=4.66",
    ],
    extras_require={"clip": ["open-clip-torch>=2.24"], "beta": ["scipy>=1.11"], "dev": DEV},
    entry_points={"console_scripts": ["atlas-diffusers = atlas_diffusers.cli:main"]},
)
