"""What commands share: output files, devices, texts and progress bars."""

import argparse
import io
from contextlib import contextmanager
from pathlib import Path


def check_output(path: Path) -> None:
    """Raise before any work is done if ``path`` cannot become a picture file."""
    from PIL import Image

    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), Image.registered_extensions()[path.suffix.lower()])
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"output {path}: expected a picture file name such as {path.stem or 'picture'}.png") from error
    if not path.parent.is_dir():
        raise OSError(f"output {path}: folder {path.parent} does not exist")


def usable_device(name: str) -> str:
    """``name``, of `auto` the best that is there, or ``ValueError`` where torch has no such device here."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        missing = name.startswith("cuda") and not torch.cuda.is_available()
        hint = " (no driver or GPU is found; try --device cpu)" if missing else ""
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}{hint}") from error
    return name


def text(argument: str) -> str:
    """An argument that is read by a network, not by the file system: bytes that are not UTF-8 say nothing."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{argument!r} is not UTF-8") from error
    return argument


@contextmanager
def no_loading_bars():
    """Only sampling shows its progress."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()
