import numpy as np
import pytest
import torch

from atlas_diffusers.transport.anderson import AndersonMixing
from atlas_diffusers.transport.small import SmallMixing


def linear_maps(size, batch, radius=0.98):
    """Contractions ``x -> M x + c`` and their fixed points."""
    generator = torch.Generator().manual_seed(size)
    basis = torch.linalg.qr(torch.randn(batch, size, size, generator=generator, dtype=torch.float64))[0]
    matrix = (basis * torch.linspace(0, radius, size, dtype=torch.float64)) @ basis.mT
    offset = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - matrix, offset)
    return (lambda x: (matrix @ x[..., None])[..., 0] + offset), exact


def run(step, x, mixing, iterations):
    for _ in range(iterations):
        image = step(x)
        x = mixing.step(image, x - image)
    return x


def test_linear_problem_is_solved_in_as_many_steps_as_it_has_dimensions():
    step, exact = linear_maps(8, 3)
    start = torch.zeros_like(exact)
    assert (run(step, start, AndersonMixing(), 12) - exact).abs().max() < 1e-6
    plain = start
    for _ in range(12):
        plain = step(plain)
    assert (plain - exact).abs().max() > 1


def test_the_first_two_steps_are_plain():
    step, exact = linear_maps(6, 1)
    start = torch.ones_like(exact)
    mixing = AndersonMixing()
    once = run(step, start, mixing, 1)
    assert torch.equal(once, step(start))
    assert torch.equal(run(step, once, mixing, 1), step(once))


def test_old_differences_leave():
    step, exact = linear_maps(40, 1)
    errors = {depth: (run(step, torch.zeros_like(exact), AndersonMixing(depth), 60) - exact).norm() for depth in (2, 16)}
    assert errors[16] < 1e-3 * errors[2]


def test_members_of_a_batch_do_not_mix():
    step, exact = linear_maps(7, 4)
    together = run(step, torch.zeros_like(exact), AndersonMixing(), 6)

    def alone(member):
        padded = torch.zeros_like(exact[member])[None]
        return run(lambda x: step(x.expand(4, -1))[member][None], padded, AndersonMixing(), 6)[0]

    for member in range(4):
        torch.testing.assert_close(together[member], alone(member), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("forgotten", [[True, False], [False, True], [True, True]])
def test_a_forgotten_history_has_no_weight(forgotten):
    step, exact = linear_maps(5, 2)
    mixing, fresh = AndersonMixing(), AndersonMixing()
    x = run(step, torch.zeros_like(exact), mixing, 4)
    image = step(x)
    mixing.forget(torch.tensor(forgotten))
    mixing._last = fresh._last = (image, x - image)  # both go on from this point
    following, plain = run(step, image, mixing, 2), run(step, image, fresh, 2)
    for member, gone in enumerate(forgotten):
        assert torch.allclose(following[member], plain[member], atol=1e-8) == gone


def test_selected_members_go_on_as_before():
    step, exact = linear_maps(6, 3)
    mixing, reference = AndersonMixing(), AndersonMixing()
    x = run(step, torch.zeros_like(exact), mixing, 4)
    run(step, torch.zeros_like(exact), reference, 4)
    members = torch.tensor([2, 0])
    mixing.select(members)
    image = step(x)
    expected = reference.step(image, x - image)[members]
    torch.testing.assert_close(mixing.step(image[members], (x - image)[members]), expected)


def test_mixing_of_a_small_problem_is_the_same():
    step, exact = linear_maps(12, 1)
    x = small = torch.zeros_like(exact)
    mixing, small_mixing = AndersonMixing(4), SmallMixing(4)
    for _ in range(9):
        image, small_image = step(x), step(small)
        x = mixing.step(image, x - image)
        small = torch.from_numpy(small_mixing.step(*((z[0].numpy()) for z in (small_image, small - small_image))))[None]
        torch.testing.assert_close(small, x, rtol=1e-7, atol=1e-7)
    assert (x - exact).norm() < 0.2 * exact.norm()


def test_mixing_of_a_small_problem_stands_still_at_a_fixed_point():
    mixing, x = SmallMixing(), np.ones(3)
    for _ in range(4):
        x = mixing.step(x, np.zeros(3))
    np.testing.assert_array_equal(x, np.ones(3))
