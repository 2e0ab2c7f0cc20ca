"""The optimiser for matrices."""

import pytest
import torch

from muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(30, 30), (20, 50), (50, 20)])
def test_orthogonal_keeps_directions_and_levels_sizes(shape):
    G = torch.randn(shape, dtype=torch.float64)
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    inside = U.T @ orthogonal(G) @ V.T
    sizes = inside.diagonal()
    assert (inside - sizes.diag()).abs().max() < 1e-6  # the same singular vectors
    assert sizes.min() > 0.3 and sizes.max() < 1.3
    torch.testing.assert_close(orthogonal(1000 * G), orthogonal(G))


def test_muon_is_that_of_torch():
    """torch's is in bfloat16, so nearly."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon before 2.9")
    ours, theirs = (torch.nn.Parameter(torch.ones(40, 20)) for _ in range(2))
    a = Muon([ours], 0.02, weight_decay=0.1)
    b = torch.optim.Muon([theirs], 0.02, weight_decay=0.1)
    start = ours.detach().clone()
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(40, 20)
        a.step()
        b.step()
    assert (ours - start).norm() > 0.1
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


def test_a_gradient_that_is_not_finite_changes_nothing():
    p = torch.nn.Parameter(torch.randn(5, 5))
    muon = Muon([p], 0.02, weight_decay=0.1)
    p.grad = torch.randn(5, 5)
    muon.step()
    weights, momentum = p.detach().clone(), muon.state[p]["momentum"].clone()
    p.grad = torch.full((5, 5), float("nan"))
    muon.found_inf = torch.ones(())
    muon.step()
    assert torch.equal(p, weights) and torch.equal(muon.state[p]["momentum"], momentum)
