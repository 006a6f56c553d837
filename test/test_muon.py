import pytest
import torch

from nope_ros.training.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (16, 144), (4, 40, 12)])
def test_an_update_has_nearly_equal_singular_values(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.3


def test_an_update_keeps_the_singular_vectors():
    torch.manual_seed(0)
    matrix = torch.randn(12, 30)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalised(matrix) @ vt.T
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 0.1


def test_it_fits_a_network_of_all_kinds_of_parameters():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 4)
    )
    x, y = torch.randn(64, 3, 4, 4), torch.randn(64, 4)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    optimizer = Muon(
        [
            {"params": matrices, "matrix": True, "weight_decay": 0.0},
            {"params": vectors, "matrix": False, "weight_decay": 0.0},
        ],
        lr=0.02,
    )
    losses = []
    for _ in range(120):
        loss = (network(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
