"""One-to-one pairs of two large clouds, in memory linear in their size."""

import torch

ROUNDS = 8  # of a split: the halves stand still after a few
LEAF, SWAPS = 64, 64
BATCH = 2**16  # rows whose leaves are compared at a time


def pair_one_to_one(x: torch.Tensor, y: torch.Tensor, leaf: int = LEAF) -> torch.Tensor:
    r"""
    A permutation p with a small ``Σ_i |x_i − y_p(i)|²``, by splitting both clouds into halves that belong together, again and
    again.

    Halves minimise the cost of the plan that is uniform within each pair of them, by turns: given the means of the halves of
    one cloud, the best halves of the other lie on the two sides of the median of its projection on the difference of these.
    Such plans of rank 2 are refined down to pairs (Halmos et al. 2025, arXiv 2503.03025); pairs of the same part of ``leaf``
    points then swap partners while that lowers the cost.

    Args:
        x, y: (n, d), equal n.
        leaf: points of the parts in which pairs are improved, a power of 2.

    Returns:
        (n,) int64.

    Raises:
        ValueError: for clouds of different shapes.
    """
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"expected two clouds (n, d) of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    rows, columns = (torch.arange(len(x), device=x.device) for _ in range(2))
    parts = [(0, len(x))]
    while parts:
        halves = []
        for start, end in parts:
            if end - start > 1:
                own = slice(start, end)
                rows[own], columns[own] = _split(x, y, rows[own], columns[own])
                middle = (start + end) // 2
                halves += [(start, middle), (middle, end)]
        parts = halves
    _swap(x, y, rows, columns, leaf)
    pairs = torch.empty_like(rows)
    pairs[rows] = columns
    return pairs


def _split(x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns, those of the first halves first."""
    own, other, half = x[rows], y[columns], len(rows) // 2
    direction = _widest(own)
    order = before = None
    for _ in range(ROUNDS):
        turned = (other @ direction).argsort()
        direction = other[turned[half:]].mean(0) - other[turned[:half]].mean(0)
        order = (own @ direction).argsort()
        if before is not None and bool((order[:half].sort().values == before).all()):
            break
        before = order[:half].sort().values
        direction = own[order[half:]].mean(0) - own[order[:half]].mean(0)
    return rows[order], columns[turned]


def _widest(points: torch.Tensor) -> torch.Tensor:
    """About the direction of the largest variance, by power iteration from the point that is furthest out."""
    centred = points - points.mean(0)
    direction = centred[centred.square().sum(1).argmax()]
    for _ in range(3):
        direction = centred.mT @ (centred @ direction)
        direction = direction / direction.norm().clamp(min=torch.finfo(direction.dtype).tiny)
    return direction


def _swap(x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, leaf: int) -> None:
    """In place: pairs of a leaf that gain most from each other exchange their columns, until none gains."""
    whole = len(rows) // leaf * leaf
    for start in range(0, whole, BATCH):
        own = slice(start, min(start + BATCH, whole))
        left, right = x[rows[own]].unflatten(0, (-1, leaf)), y[columns[own]].unflatten(0, (-1, leaf))
        products = left @ right.mT
        places = torch.arange(leaf, device=x.device).expand(len(left), leaf).clone()
        for _ in range(SWAPS * leaf):
            # C_ij + C_ji − C_ii − C_jj of each two pairs, of which only the products differ
            chosen = products.gather(2, places[:, None].expand_as(products))
            kept = chosen.diagonal(dim1=1, dim2=2)
            gain = chosen + chosen.mT - kept[:, :, None] - kept[:, None]
            best, partner = gain.max(2)
            mutual = partner.gather(1, partner) == torch.arange(leaf, device=x.device)
            moving = mutual & (best > 1e-6 * kept.abs().amax(1, keepdim=True))
            if not bool(moving.any()):
                break
            places = torch.where(moving, places.gather(1, partner), places)
        columns[own] = columns[own].unflatten(0, (-1, leaf)).gather(1, places).flatten()
