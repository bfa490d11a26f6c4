"""References in files give what references in memory give."""

import pytest
import torch
from oracles import points
from safetensors.torch import save_file

from atlas_diffusers.bridges import ReferenceShards, SchrodingerBridgeSolver, reference_shards


def shards(folder, values, sizes):
    files = []
    for index, part in enumerate(values.split(sizes)):
        files.append(folder / f"{index}.safetensors")
        save_file({"references": part.contiguous()}, files[-1])
    return files


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(reference_shards, "BLOCK_BYTES", 7 * 12 * 8)


@pytest.mark.parametrize("n, weighted", [(20, True), (50, False), (1, True)])
@pytest.mark.parametrize("level", [(0.6, 0.8), (1.0, 0.5), (0.0, 1.0)])
def test_shards_are_the_references(tmp_path, level, n, weighted):
    y, x = points(40, 3, 2, 2), points(n, 3, 2, 2, seed=1)
    weights = points(40, seed=2).abs() if weighted else None
    memory = SchrodingerBridgeSolver(y, weights, tolerance=1e-9)
    stored = SchrodingerBridgeSolver(ReferenceShards(shards(tmp_path, y, [11, 25, 4])), weights, tolerance=1e-9)
    expected, coupling = (solver.couple(x, *level) for solver in (memory, stored))
    for name in ("data", "posterior", "effective_references"):
        torch.testing.assert_close(getattr(coupling, name), getattr(expected, name), rtol=0, atol=1e-7)
    torch.testing.assert_close(stored.nearest_reference(x), memory.nearest_reference(x))
    if level[0]:
        assert stored.posterior_size(*level) == pytest.approx(memory.posterior_size(*level), rel=1e-9)


def test_single_precision_and_warm_starts(tmp_path):
    y, x = points(200, 12, dtype=torch.float32), points(60, 12, seed=1, dtype=torch.float32)
    memory, stored = SchrodingerBridgeSolver(y), SchrodingerBridgeSolver(ReferenceShards(shards(tmp_path, y, 90)))
    expected, coupling = memory.couple(x, 0.5, 0.8), stored.couple(x, 0.5, 0.8)
    # both plans are within 1e-3 of the marginals in L1: the masses moved between them carry at most 2e-3 max|y|
    assert (coupling.data - expected.data).abs().mean() < 2e-3 * y.abs().max()
    torch.testing.assert_close(coupling.posterior, expected.posterior, rtol=0, atol=1e-5)
    assert coupling.data.dtype is torch.float32
    again = stored.couple(x, 0.5, 0.8, coupling.state)
    assert again.kernel_applications < coupling.kernel_applications


def test_blocks_bound_what_is_read_at_once(tmp_path):
    y = points(40, 12)
    parts = [block for _, block in ReferenceShards(shards(tmp_path, y, 15))._blocks()]
    assert [len(part) for part in parts] == [7, 7, 1, 7, 7, 1, 7, 3]
    assert torch.equal(torch.cat(parts), y)


def test_bad_files_are_named(tmp_path):
    y = points(10, 3)
    with pytest.raises(ValueError, match="at least one safetensors file"):
        ReferenceShards([])
    save_file({"latents": y}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors has tensors \['latents'\]; expected `references`"):
        ReferenceShards([tmp_path / "other.safetensors"])
    assert ReferenceShards([tmp_path / "other.safetensors"], name="latents").shape == (10, 3)
    files = shards(tmp_path, y, 5)
    save_file({"references": points(4, 2)}, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"one shape and dtype.*narrow.safetensors: torch.float64 \(2,\)"):
        ReferenceShards([*files, tmp_path / "narrow.safetensors"])
    y[7] = torch.nan
    with pytest.raises(ValueError, match="contain 3 values that are NaN"):
        ReferenceShards(shards(tmp_path, y, 5))
    with pytest.raises(ValueError, match="solver_type='nystrom' needs references in memory"):
        SchrodingerBridgeSolver(ReferenceShards([tmp_path / "other.safetensors"], "latents"), solver_type="nystrom")


@pytest.mark.parametrize("prune", [1e-3, 0.05])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
def test_what_is_pruned_moves_projections_by_no_more_than_its_mass(tmp_path, prune, sigma):
    y, x = points(400, 3), points(30, 3, seed=1)
    files = shards(tmp_path, y, 100)
    exact, pruned = (SchrodingerBridgeSolver(ReferenceShards(files, prune=mass), tolerance=1e-9) for mass in (0.0, prune))
    expected, found = (solver.couple(x, 1.0, sigma) for solver in (exact, pruned))
    for name in ("data", "posterior"):
        moved = (getattr(found, name) - getattr(expected, name)).norm(dim=1)
        assert moved.max() <= prune * torch.cdist(y, y).max() + 1e-12
    assert torch.equal(found.effective_references, expected.effective_references)


def test_blocks_without_weight_are_not_read(tmp_path):
    y = torch.cat([points(70, 3) * 0.1, points(70, 3) * 0.1 + 50])
    read, references = {False: [], True: []}, ReferenceShards(shards(tmp_path, y, 70), prune=1e-3)
    blocks = references._blocks

    def watched(used=None):
        for columns, block in blocks(used):
            read[used is not None].append(columns.start)
            yield columns, block

    references._blocks = watched
    SchrodingerBridgeSolver(references, rho=1e-6).couple(points(20, 3) * 0.1, 1.0, 0.5)
    assert max(read[False]) >= 70 > max(read[True])


def test_a_share_of_the_mass_that_cannot_be_left_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"prune=1.0 must be in \[0, 1\)"):
        ReferenceShards(shards(tmp_path, points(4, 3), 4), prune=1.0)


def test_references_can_be_moved(tmp_path):
    y, x = points(40, 3), points(9, 3, seed=1)
    moved = ReferenceShards(shards(tmp_path, y, 25)).to("cpu")
    found, expected = (SchrodingerBridgeSolver(each, tolerance=1e-9).couple(x, 0.6, 0.8).data for each in (moved, y))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
