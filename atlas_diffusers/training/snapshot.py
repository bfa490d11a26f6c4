"""Everything that an exact resume needs, as named tensors and JSON, and back."""

from typing import Any

import torch
from diffusers.training_utils import EMAModel

# what AdamW, and Muon, keep of a weight
MOMENTS = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)
SHOWN = 3


class Snapshot:
    """
    The state of a run.

    Args:
        parameters: trained weights by name.
        ema: averages of the same, in the same order.
        optimizer, lr_scheduler: of the same; AdamW, or :class:`~.optimizers.MuonAdamW`.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], ema: EMAModel, optimizer: Any, lr_scheduler: Any):
        self.parameters, self.ema, self.optimizer, self.lr_scheduler = parameters, ema, optimizer, lr_scheduler
        names = {id(p): name for name, p in parameters.items()}
        groups = [(group, names[id(p)]) for group in optimizer.param_groups for p in group["params"]]
        self.places = {name: place for place, (_, name) in enumerate(groups)}
        self.keys = {name: MOMENTS["momentum" in group] for group, name in groups}

    def take(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors by ``weight.NAME``, ``average.NAME``, ``moment.NAME.KEY``, and the rest."""
        tensors, moments = {}, self.optimizer.state_dict()["state"]
        for average, (name, p) in zip(self.ema.shadow_params, self.parameters.items()):
            tensors |= {f"weight.{name}": p, f"average.{name}": average}
            tensors |= {f"moment.{name}.{key}": value for key, value in moments.get(self.places[name], {}).items()}
        still = [name for name, place in self.places.items() if place not in moments]
        steps = {"ema_step": self.ema.optimization_step, "lr_step": self.lr_scheduler.last_epoch}
        return tensors, {**steps, "without_moments": still}

    def restore(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        """
        Put a snapshot back; the learning rate is the recipe's at the step that the snapshot has.

        Raises:
            ValueError: for weights of another architecture, and moments that are missing, naming them.
        """
        self._check(tensors)
        moved = {name: p for name, p in self.parameters.items() if name not in state["without_moments"]}
        wanted = [f"moment.{name}.{key}" for name in moved for key in self.keys[name]]
        if missing := [key for key in wanted if key not in tensors]:
            raise ValueError(f"it lacks {_some(missing)}")
        for average, (name, p) in zip(self.ema.shadow_params, self.parameters.items()):
            p.data.copy_(tensors[f"weight.{name}"])
            average.copy_(tensors[f"average.{name}"])
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            self.places[name]: {key: _like(p, tensors[f"moment.{name}.{key}"]) for key in self.keys[name]}
            for name, p in moved.items()
        }
        self.optimizer.load_state_dict(optimizer)
        self.ema.optimization_step = state["ema_step"]
        schedule, step = self.lr_scheduler, state["lr_step"]
        rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step, "_last_lr": rates})
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate

    def _check(self, tensors: dict[str, torch.Tensor]) -> None:
        found = {key.removeprefix("weight."): tuple(v.shape) for key, v in tensors.items() if key.startswith("weight.")}
        wanted = {name: tuple(p.shape) for name, p in self.parameters.items()}
        shared = [name for name in wanted if name in found]
        parts = {
            "it lacks": [name for name in wanted if name not in found],
            "it has besides": [name for name in found if name not in wanted],
            "of another shape": [f"{n} {found[n]} instead of {wanted[n]}" for n in shared if found[n] != wanted[n]],
        }
        texts = [f"{what} {_some(names)}" for what, names in parts.items() if names]
        if texts:
            raise ValueError("its weights are of another network: " + "; ".join(texts))


def _like(p: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The fused update runs over raw memory: moments need the layout of their weight."""
    return torch.empty_like(p).copy_(moment) if moment.shape == p.shape else moment


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
