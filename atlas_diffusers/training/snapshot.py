"""Everything that an exact resume needs, as named tensors and JSON, and back."""

from typing import Any

import torch
from diffusers.training_utils import EMAModel

# what AdamW, and Muon, keep of a weight
MOMENTS = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)
SHOWN = 3


class Snapshot:
    """
    The state of a run, of whole weights or of weights split over processes.

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

    def take(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by ``weight.NAME``, ``average.NAME``, ``moment.NAME.KEY``, and the rest."""
        tensors, moments = self._in_place(), self.optimizer.state_dict()["state"]
        for name, place in self.places.items():
            tensors |= {f"moment.{name}.{key}": value for key, value in moments.get(place, {}).items()}
        still = [name for name, place in self.places.items() if place not in moments]
        steps = {"ema_step": self.ema.optimization_step, "lr_step": self.lr_scheduler.last_epoch}
        return tensors, {**steps, "without_moments": still}

    def _in_place(self) -> dict[str, torch.Tensor]:
        """Weights and averages where they are."""
        tensors = {}
        for average, (name, p) in zip(self.ema.shadow_params, self.parameters.items()):
            tensors |= {f"weight.{name}": p.detach(), f"average.{name}": average}
        return tensors

    def blank(self, layout: dict[str, torch.Tensor], state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """
        Tensors to read a snapshot into: weights and averages themselves, and new moments.

        Args:
            layout: of the snapshot, tensors by name.
            state: of the snapshot.

        Raises:
            ValueError: for weights of another architecture, and moments that are missing, naming them.
        """
        self._check(layout)
        tensors = self._in_place()
        for name, p in self.parameters.items():
            if name not in state["without_moments"]:
                # the fused update runs over raw memory: moments need the layout of their weight
                found = {key: torch.zeros(()) if key == "step" else torch.empty_like(p.detach()) for key in self.keys[name]}
                tensors |= {f"moment.{name}.{key}": value for key, value in found.items()}
        if missing := [name for name in tensors if name not in layout]:
            raise ValueError(f"it lacks {_some(missing)}")
        return tensors

    def restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Go on from what :meth:`blank` gave, once filled; the learning rate is the recipe's at the step that it has."""
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            place: {key: tensors[f"moment.{name}.{key}"] for key in self.keys[name]}
            for name, place in self.places.items()
            if name not in state["without_moments"]
        }
        self.optimizer.load_state_dict(optimizer)
        self.ema.optimization_step = state["ema_step"]
        schedule, step = self.lr_scheduler, state["lr_step"]
        rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step, "_last_lr": rates})
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate

    def _check(self, layout: dict[str, torch.Tensor]) -> None:
        found = {key.removeprefix("weight."): tuple(v.shape) for key, v in layout.items() if key.startswith("weight.")}
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


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
