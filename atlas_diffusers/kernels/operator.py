"""What a kernel operator is, and the registry of them."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

import torch

Operator = TypeVar("Operator", bound="KernelOperator")

KERNEL_OPERATORS: dict[str, type["KernelOperator"]] = {}


def logsumexp_(terms: torch.Tensor) -> torch.Tensor:
    """
    ``log Σ exp`` over the last axis, which is kept; overwrites ``terms``.

    Several times as fast as torch.logsumexp: no copies, and nothing below the normal numbers, where exp is slow.
    """
    top = terms.detach().amax(-1, keepdim=True)
    smallest = math.log(torch.finfo(terms.dtype).tiny) + 0.1
    terms = terms.sub_(torch.where(top.isfinite(), top, 0)).clamp_(min=smallest)
    return terms.exp_().sum(-1, keepdim=True).log() + top


class KernelOperator(ABC):
    """
    The matrix ``K_ij = k(x_i, y_j)`` as a linear map, with as much of it stored as the subclass likes.

    A subclass calls ``super().__init__`` and writes ``matvec`` and ``rmatvec``; ``logmatvec`` and ``rlogmatvec`` where they
    exist. Registered under a name, it is made by ``make_kernel_operator(..., solver_type=name)`` as
    ``cls(x, y, kernel=..., epsilon=..., scale_factors=..., **options)`` with those options that ``cls.options`` lists.

    Args:
        shape: ``(n, m)``.
        dtype: of the entries.
        device: where they live.
        cost_unit: c of the cost ``C = −c log K`` that transport through this operator has; ``None`` if the operator has none
            in mind. For a gaussian kernel of bandwidth h it is ``2 h²``, so that C is the squared distance.
        points: x ``(n, d)`` and y ``(m, d)``, where the operator is between points.
    """

    options: ClassVar[tuple[str, ...]] = ()
    reason: str = "asked for"
    """Why this operator was chosen."""

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        cost_unit: float | None = None,
        points: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        self.shape, self.dtype, self.device, self.cost_unit, self.points = shape, dtype, device, cost_unit, points

    @property
    def has_squared_distances(self) -> bool:
        """Whether the cost ``−c log K`` is exactly the squared distance of ``points``."""
        return False

    @classmethod
    def from_points(cls: type[Operator], x: torch.Tensor, y: torch.Tensor, **arguments: Any) -> Operator:
        """The operator between points ``(n, d)`` and ``(m, d)``."""
        make: Any = cls
        return make(x, y, **arguments)

    @property
    def is_positive(self) -> bool:
        """Whether no entry is negative, as Sinkhorn needs."""
        return True

    @abstractmethod
    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """``K v``: ``(m,)`` to ``(n,)``, or ``(m, k)`` to ``(n, k)``."""

    @abstractmethod
    def rmatvec(self, u: torch.Tensor) -> torch.Tensor:
        """``Kᵀ u``: ``(n,)`` to ``(m,)``, or ``(n, k)`` to ``(m, k)``."""

    def logmatvec(self, f: torch.Tensor) -> torch.Tensor:
        """``log Σ_j K_ij exp(f_j)``: ``(m,)`` to ``(n,)``, right also where ``K`` and ``exp(f)`` underflow or overflow."""
        raise NotImplementedError(f"{type(self).__name__} has no logarithmic product, only matvec; a DirectKernel has both")

    def rlogmatvec(self, g: torch.Tensor) -> torch.Tensor:
        """``log Σ_i K_ij exp(g_i)``: ``(n,)`` to ``(m,)``."""
        raise NotImplementedError(f"{type(self).__name__} has no logarithmic product, only rmatvec; a DirectKernel has both")

    def dense(self) -> torch.Tensor:
        """The matrix, ``(n, m)``, whatever memory it takes."""
        return self.matvec(torch.eye(self.shape[1], dtype=self.dtype, device=self.device))

    @property
    def transpose(self) -> "KernelOperator":
        """The operator of ``Kᵀ``, sharing everything with this one."""
        return TransposedKernel(self)

    T = transpose

    def _check(self, vector: torch.Tensor, size: int, columns: bool = True) -> None:
        """Raise ``ValueError`` unless ``vector`` is ``(size,)`` or, where columns are allowed, ``(size, k)``."""
        if vector.ndim not in ((1, 2) if columns else (1,)) or vector.shape[0] != size:
            expected = f"({size},) or ({size}, k)" if columns else f"({size},)"
            raise ValueError(f"expected {expected} for a kernel of shape {self.shape}, got {tuple(vector.shape)}")


class TransposedKernel(KernelOperator):
    """``Kᵀ`` of another operator."""

    def __init__(self, operator: KernelOperator):
        points = None if operator.points is None else (operator.points[1], operator.points[0])
        super().__init__((operator.shape[1], operator.shape[0]), operator.dtype, operator.device, operator.cost_unit, points)
        self._operator, self.reason = operator, operator.reason

    @property
    def is_positive(self) -> bool:
        return self._operator.is_positive

    @property
    def has_squared_distances(self) -> bool:
        return self._operator.has_squared_distances

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self._operator.rmatvec(v)

    def rmatvec(self, u: torch.Tensor) -> torch.Tensor:
        return self._operator.matvec(u)

    def logmatvec(self, f: torch.Tensor) -> torch.Tensor:
        return self._operator.rlogmatvec(f)

    def rlogmatvec(self, g: torch.Tensor) -> torch.Tensor:
        return self._operator.logmatvec(g)

    def dense(self) -> torch.Tensor:
        return self._operator.dense().mT

    @property
    def transpose(self) -> KernelOperator:
        return self._operator

    T = transpose


def register_kernel_operator(name: str):
    """
    Class decorator: make a :class:`KernelOperator` known as ``solver_type=name``.

    Raises:
        ValueError: if the name is taken by another class, or is ``auto``.
    """

    def register(cls: type[Operator]) -> type[Operator]:
        if name == "auto" or KERNEL_OPERATORS.get(name, cls) is not cls:
            raise ValueError(f"kernel operator {name!r} is registered already")
        KERNEL_OPERATORS[name] = cls
        return cls

    return register
