"""Router rows fitted to clusters, against what their definition says."""

import pytest
import torch

from moetools.methods.router_fit import cluster_logits, fit_router


def test_cluster_logits_keep_the_softmax_mass() -> None:
    logits = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    clusters = [(0, 3), (1,), (2, 4)]
    grouped = cluster_logits(logits, clusters, "softmax").softmax(1)
    wanted = torch.stack([logits.softmax(1)[:, list(cluster)].sum(1) for cluster in clusters], 1)
    assert torch.allclose(grouped, wanted)
    sigmoid = cluster_logits(logits - 3, clusters, "sigmoid").sigmoid()
    assert torch.allclose(sigmoid[:, 1], (logits - 3)[:, 1].sigmoid())
    assert torch.allclose(sigmoid[:, 0], (logits - 3)[:, [0, 3]].sigmoid().sum(1).clamp(max=1 - 1e-4))


@pytest.mark.parametrize("biased", [False, True])
def test_fitted_rows_of_duplicates_are_exact(biased: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, rows = torch.randn(500, 6, generator=generator), torch.randn(3, 6, generator=generator)
    rows, bias = torch.cat((rows, rows)), torch.randn(3, generator=generator).repeat(2) if biased else None
    logits = hidden @ rows.T + (0 if bias is None else bias)
    clusters = [(0, 3), (1, 4), (2, 5)]
    fitted, new_bias = fit_router(hidden, logits, clusters, rows_ED=rows, bias_E=bias, scoring="softmax")
    assert torch.allclose(fitted, rows[:3], atol=1e-2 if biased else 0.1)
    assert (new_bias is None) == (bias is None)
    if bias is not None:
        assert torch.allclose(new_bias, bias[:3] + torch.log(torch.tensor(2.0)), atol=1e-2)


def test_a_lone_expert_keeps_its_row() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, rows = torch.randn(50, 4, generator=generator), torch.randn(3, 4, generator=generator)
    fitted, _ = fit_router(hidden, hidden @ rows.T, [(0,), (2, 1)], rows_ED=rows, bias_E=None, scoring="softmax")
    assert torch.equal(fitted[0], rows[0])
    assert not torch.equal(fitted[1], rows[2])
