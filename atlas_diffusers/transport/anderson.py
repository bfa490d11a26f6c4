"""Anderson acceleration of fixed-point iterations, for a batch of them at once."""

from functools import cache

import torch

RIDGE = 1e-10


@cache
def diagonals(size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with a tiny diagonal, and one of ones with the ridge added on the diagonal."""
    unit = torch.eye(size, dtype=dtype, device=device)
    return unit * torch.finfo(dtype).tiny, 1 + unit * RIDGE


class AndersonMixing:
    r"""
    Type-II Anderson acceleration of ``x = T(x)``: with residuals ``r_k = x_k − T(x_k)`` and the last differences Δ of each,

        x_{k+1} = T(x_k) − ΔT γ,    γ = argmin |r_k − Δr γ|²

    Walker & Ni 2011 (doi 10.1137/10078356X), equation 2.1. The normal equations are kept as a Gram matrix and solved by
    Cholesky with a relative ridge of 1e-10. The first two steps are plain, as two differences must exist. Nothing is
    read back to the host.

    Args:
        depth: number of differences.
    """

    def __init__(self, depth: int = 16):
        self.depth = depth
        self._count = 0
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def step(self, image: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The next point, from ``T(x)`` and ``x − T(x)``, all (batch, size)."""
        last, self._last = self._last, (image, residual)
        if last is None:
            return image
        if self._count == 0:
            self._allocate(image)
        slot = self._count % self.depth
        self._count += 1
        newest = torch.sub(residual, last[1], out=self._residual_slots[slot])
        torch.sub(image, last[0], out=self._image_slots[slot])
        products = self._residuals @ torch.stack((newest, residual), dim=-1)
        row, target = products.split(1, dim=-1)
        row = torch.addcmul(self._floor[slot], row[..., 0], self._ridge[slot])
        self._gram_rows[slot].copy_(row)
        self._gram_columns[slot].copy_(row)
        if self._count < 2:
            return image
        weights = torch.cholesky_solve(target, torch.linalg.cholesky_ex(self._gram)[0])
        return torch.baddbmm(image[..., None], self._images.mT, weights, alpha=-1)[..., 0]

    def _allocate(self, like: torch.Tensor) -> None:
        """A slot that is not in use has differences of zero and a tiny diagonal entry, and so weight 0."""
        self._images = like.new_zeros(len(like), self.depth, like.shape[1])
        self._residuals = torch.zeros_like(self._images)
        self._floor, self._ridge = diagonals(self.depth, like.dtype, like.device)
        self._gram = self._floor.expand(len(like), -1, -1).clone()
        self._keep_views()

    def _keep_views(self) -> None:
        self._image_slots, self._residual_slots = self._images.unbind(1), self._residuals.unbind(1)
        self._gram_rows, self._gram_columns = self._gram.unbind(1), self._gram.unbind(2)

    def forget(self, members: torch.Tensor) -> None:
        """Empty the history of the members where this mask (batch,) holds."""
        if self._count:
            self._residuals.masked_fill_(members[:, None, None], 0)
            self._gram.copy_(torch.where(members[:, None, None], self._floor, self._gram))

    def select(self, members: torch.Tensor) -> None:
        """Keep these members of the batch."""
        if self._last is not None:
            self._last = (self._last[0][members], self._last[1][members])
        if self._count:
            self._images, self._residuals = self._images[members], self._residuals[members]
            self._gram = self._gram[members]
            self._keep_views()
