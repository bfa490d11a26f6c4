"""What a caller gives to the solver, checked."""

import math
from dataclasses import dataclass

import torch

NEGLIGIBLE = 1e-200  # a weight below this fraction of the largest is zero to the solver
ROUNDING = 1e-3  # totals that differ by less are equal

Init = tuple[torch.Tensor | None, torch.Tensor]
"""Potentials f and g to start from; without f, g alone says where."""


@dataclass(frozen=True)
class Options:
    """
    See :func:`~atlas_diffusers.transport.entropic_transport`.

    Raises:
        ValueError: for a value out of range.
    """

    tolerance: float
    max_iterations: int
    check_every: int | None
    max_bytes: int

    def __post_init__(self):
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance={self.tolerance} must be positive")
        limits = {"max_iterations": self.max_iterations, "check_every": self.check_every, "max_bytes": self.max_bytes}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1{' or None' if name == 'check_every' else ''}")

    @property
    def reads(self) -> bool:
        """Whether the host may read values."""
        return self.check_every is not None


def check_epsilon(epsilon: float | torch.Tensor | None, shape: tuple[int, ...]) -> list[float]:
    """ε of every problem; ``ValueError`` unless positive and finite."""
    if isinstance(epsilon, torch.Tensor):
        try:
            values = epsilon.detach().double().expand(shape).flatten().tolist()
        except RuntimeError:
            raise ValueError(f"epsilon must be a number or have shape {tuple(shape)}, got {tuple(epsilon.shape)}") from None
    elif epsilon is None:
        raise ValueError("epsilon is missing: the width of the plan, in the unit of the cost")
    else:
        values = [float(epsilon)] * math.prod(shape)
    for value in values:
        if not 0 < value < math.inf:
            raise ValueError(f"epsilon={value} must be positive and finite")
    return values


def check_rho(rho: float | tuple[float | None, float | None] | None) -> tuple[float, float]:
    """Penalties of both marginals, infinite where they are exact; ``ValueError`` unless positive."""
    pair = tuple(rho) if isinstance(rho, tuple | list) else (rho, rho)
    if len(pair) != 2 or not all(value is None or value > 0 for value in pair):
        raise ValueError(f"rho={rho} must be positive, None, or a pair of such values")
    row, column = (math.inf if value is None else float(value) for value in pair)
    return row, column


def check_init(
    init: Init | None,
    shape: tuple[int, ...],
    sizes: tuple[int, int],
    device: torch.device,
    read: bool,
) -> Init | None:
    """Potentials, float64, (batch, n) and (batch, m); ``ValueError`` for other shapes and values that are not finite."""
    if init is None:
        return None
    if len(init) != 2 or init[1] is None:
        raise ValueError("init must be a pair of potentials (f, g), of which f may be None")
    row = None if init[0] is None else _flat("init f", init[0], shape, sizes[0], device)
    column = _flat("init g", init[1], shape, sizes[1], device)
    for name, potential in (("f", row), ("g", column)) if read else ():
        if potential is not None and not bool(potential.isfinite().all()):
            raise ValueError(f"init: potentials {name} must be finite")
    return row, column


@dataclass(frozen=True)
class Marginals:
    """
    Checked weights, float64.

    Args:
        a: (batch, n).
        b: (batch, m).
        smallest: the smallest weight that counts over the largest; 0 if that was not read.
        has_zeros: whether some weight is negligible, or that was not read.
    """

    a: torch.Tensor
    b: torch.Tensor
    smallest: float = 1.0
    has_zeros: bool = False

    @classmethod
    def of(
        cls,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        shape: tuple[int, ...],
        sizes: tuple[int, int],
        device: torch.device,
        balanced: bool,
        read: bool,
    ) -> "Marginals":
        """
        Weights as the caller gave them; ``None`` is uniform, with the total of the other or 1.

        Args:
            a, b: weights that broadcast to (*shape, n) and (*shape, m).
            shape: leading dimensions.
            sizes: ``(n, m)``.
            device: of the points.
            balanced: the totals must agree; ``b`` is scaled to remove a rounding error.
            read: check the values.

        Raises:
            ValueError: for another shape, weights that are negative, not finite or all zero, and totals that differ.
        """
        given = {
            name: _flat(f"weights {name}", w, shape, size, device)
            for name, w, size in zip("ab", (a, b), sizes)
            if w is not None
        }
        for name, weights in given.items() if read else ():
            _check_weights(name, weights)
        total = next((w.sum(-1, keepdim=True) for w in given.values()), 1.0)
        for name, size in zip("ab", sizes):
            if name not in given:
                given[name] = torch.full((math.prod(shape), size), 1 / size, dtype=torch.float64, device=device) * total
        a, b = given["a"], given["b"]
        if isinstance(total, float):
            return cls(a, b)
        if balanced:
            b = b * _ratio_of_totals(a, b, read)
        if not read:
            return cls(a, b, 0.0, True)
        relative = [w.detach() / w.detach().amax(-1, keepdim=True) for w in (a, b)]
        smallest = min(float(torch.where(w > NEGLIGIBLE, w, 1).amin()) for w in relative)
        return cls(a, b, smallest, any(bool((w <= NEGLIGIBLE).any()) for w in relative))

    def detach(self) -> "Marginals":
        return Marginals(self.a.detach(), self.b.detach(), self.smallest, self.has_zeros)

    def negligible(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the weights are zero to the solver."""
        return is_negligible(self.a), is_negligible(self.b)

    def log(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``log a`` and ``log b``, −∞ where a weight is negligible."""
        return (log_weights(self.a), log_weights(self.b)) if self.has_zeros else (self.a.log(), self.b.log())


def is_negligible(weights: torch.Tensor) -> torch.Tensor:
    """Where weights (..., n) are zero to the solver."""
    return weights <= NEGLIGIBLE * weights.amax(-1, keepdim=True)


def log_weights(weights: torch.Tensor) -> torch.Tensor:
    """Logarithm of weights (..., n), −∞ with gradient 0 where they are negligible."""
    zero = is_negligible(weights)
    return torch.where(zero, 1, weights).log().masked_fill(zero, -math.inf)


def _flat(name: str, values: torch.Tensor, shape: tuple[int, ...], size: int, device: torch.device) -> torch.Tensor:
    values = torch.as_tensor(values, dtype=torch.float64, device=device)
    try:
        return values.expand(*shape, size).reshape(-1, size)
    except RuntimeError:
        raise ValueError(f"{name} must have shape {(*shape, size)}, got {tuple(values.shape)}") from None


def _check_weights(name: str, weights: torch.Tensor) -> None:
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        low, high = float(weights.min()), float(weights.max())
        raise ValueError(f"weights {name} must be finite and not negative; they lie in [{low}, {high}]")
    if not bool((weights.sum(-1) > 0).all()):
        raise ValueError(f"weights {name} must not be all zero")


def _ratio_of_totals(a: torch.Tensor, b: torch.Tensor, read: bool) -> torch.Tensor:
    totals = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
    ratio = totals[0] / totals[1]
    if read and not bool(((ratio - 1).abs() <= ROUNDING).all()):
        values = " and ".join(str(total.flatten().tolist()) for total in totals)
        raise ValueError(f"weights a and b must have equal totals unless rho relaxes a marginal; the totals are {values}")
    return ratio
