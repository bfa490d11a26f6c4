"""The scale of a network's LoRA layers, for the time of a network call."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_CHANGED = threading.Condition()


@dataclass
class _Use:
    """How many calls compute with a network now, with which scale, and what its layers' own scales are."""

    scale: float = 1.0
    calls: int = 0
    own: list[tuple[Any, dict]] = field(default_factory=list)


_USES: WeakKeyDictionary[nn.Module, _Use] = WeakKeyDictionary()


class LoraScale:
    """
    ``with LoraScale(network, 0.5)():`` multiplies the scales of the network's LoRA layers, and restores them exactly.

    A scale is a state of the layers, so calls of several threads with one scale run side by side, and those with another wait
    until it is free.

    Args:
        network: any module; without LoRA layers nothing happens.
        scale: the factor.
    """

    def __init__(self, network: nn.Module, scale: float = 1.0):
        self.network, self.scale = network, scale
        self.layers: list[Any] = [module for module in network.modules() if hasattr(module, "scale_layer")]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The scale, for the time of a ``with`` block."""
        if not self.layers:
            yield
            return
        with _CHANGED:
            use = _USES.setdefault(self.network, _Use())
            _CHANGED.wait_for(lambda: not use.calls or use.scale == self.scale)
            if not use.calls:
                use.scale, use.own = self.scale, [(layer.scaling, dict(layer.scaling)) for layer in self.layers]
                for layer in self.layers:
                    layer.scale_layer(self.scale)
            use.calls += 1
        try:
            yield
        finally:
            with _CHANGED:
                use.calls -= 1
                if not use.calls:
                    for scaling, values in use.own:
                        scaling.update(values)
                    _CHANGED.notify_all()
