"""Router rows of merged experts: fitted so that a cluster draws the tokens its members drew together."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.architectures.base import Scoring

_RIDGE = 1e-3
_EDGE = 1e-4


def cluster_logits(
    logits_NE: Float[Tensor, "N E"], clusters: Sequence[Sequence[int]], scoring: Scoring
) -> Float[Tensor, "N C"]:
    """Logits of the exact grouped router.

    Softmax families: logsumexp of the members' logits, which keeps the cluster's softmax share. Sigmoid families:
    the logit of the members' summed scores (capped below 1, the most one expert can score).
    """
    if scoring == "sigmoid":
        scores = [logits_NE[:, list(cluster)].sigmoid().sum(1) for cluster in clusters]
        return torch.logit(torch.stack(scores, 1).clamp(_EDGE, 1 - _EDGE))
    return torch.stack([logits_NE[:, list(cluster)].logsumexp(1) for cluster in clusters], 1)


def router_bytes(tokens: int, hidden_size: int) -> int:
    """Memory that `fit_router` takes: inputs in fp64, with a column of ones, and their Gram matrix and its factors."""
    return 16 * hidden_size * (hidden_size + tokens)


def fit_router(
    hidden_ND: Float[Tensor, "N D"],
    logits_NE: Float[Tensor, "N E"],
    clusters: Sequence[Sequence[int]],
    *,
    rows_ED: Float[Tensor, "E D"],
    bias_E: Float[Tensor, "E"] | None,
    scoring: Scoring,
) -> tuple[Float[Tensor, "C D"], Float[Tensor, "C"] | None]:
    """Ridge regression of each cluster's exact logit on the router's input, shrunk towards the members' own rows.

    min_R ||Z - X R^T||^2 + lambda ||R - R0||^2, X [N, D] router inputs (with a column of ones if the router has a
    bias), Z the exact grouped logits, R0 the first member's row, lambda = 1e-3 * mean(diag(X^T X)). A cluster of one
    keeps its row as it is: it already is the solution.

    Args:
        rows_ED, bias_E: the old router.

    Returns:
        Rows and biases of the new router, C clusters.
    """
    exact_NC = cluster_logits(logits_NE, clusters, scoring).double()
    first = torch.tensor([cluster[0] for cluster in clusters], device=rows_ED.device)
    start = rows_ED[first].double()
    inputs = hidden_ND.double()
    if bias_E is not None:
        inputs = torch.cat((inputs, torch.ones_like(inputs[:, :1])), 1)
        start = torch.cat((start, bias_E[first, None].double()), 1)
    gram = inputs.T @ inputs
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    step = torch.linalg.solve(gram, inputs.T @ (exact_NC - inputs @ start.T)).T
    single = torch.tensor([len(cluster) == 1 for cluster in clusters], device=rows_ED.device)
    fitted = start + torch.where(single[:, None], torch.zeros_like(step), step)
    return fitted[:, : rows_ED.shape[1]].float(), None if bias_E is None else fitted[:, -1].float()
