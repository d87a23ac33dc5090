"""Router rows fitted to clusters, against what their definition says."""

import itertools

import pytest
import torch

from moetools.methods.router_fit import cluster_logits, fit_router


def test_cluster_logits_keep_the_softmax_mass() -> None:
    logits = torch.randn(7, 5, dtype=torch.float64)
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
    fitted = fit_router(hidden, logits, clusters, rows_ED=rows, bias_E=bias, scoring="softmax", top_k=2)
    assert fitted.agreement > (0.999 if biased else 0.9)
    if bias is not None:
        assert fitted.bias_E is not None
        assert torch.allclose(fitted.rows_ED, rows[:3], atol=1e-2)
        assert torch.allclose(fitted.bias_E, bias[:3] + torch.log(torch.tensor(2.0)), atol=1e-2)


def test_a_lone_expert_keeps_its_row() -> None:
    hidden, rows = torch.randn(50, 4), torch.randn(3, 4)
    fitted = fit_router(hidden, hidden @ rows.T, [(0,), (2, 1)], rows_ED=rows, bias_E=None, scoring="softmax", top_k=1)
    assert torch.equal(fitted.rows_ED[0], rows[0])
    assert not torch.equal(fitted.rows_ED[1], rows[2])


def test_agreement_counts_shared_choices() -> None:
    hidden = torch.eye(4)
    rows = torch.tensor(list(itertools.islice(itertools.cycle([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]), 4)))
    fitted = fit_router(
        hidden, hidden @ rows.T, [(0,), (1,), (2,), (3,)], rows_ED=rows, bias_E=None, scoring="softmax", top_k=2
    )
    assert fitted.agreement == 1.0
