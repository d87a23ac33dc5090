"""The chunked loss against plain autograd over whole logits, in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moetools.training import loss as module
from moetools.training.loss import FullTargets, Head, LossOptions, TopTargets, distillation_loss

T, V, D, H = 23, 57, 8, 6


def plain(options: LossOptions, student: Tensor, teacher: Tensor | None, label: Tensor) -> Tensor:
    """Whole logits, torch's own losses."""
    cross_entropy = functional.cross_entropy(student, label, reduction="sum")
    if teacher is None:
        return cross_entropy
    tau = options.temperature
    log_q, log_p = (torch.log_softmax(logits / tau, -1) for logits in (student, teacher))
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()

    def kl(left: Tensor, right: Tensor) -> Tensor:
        return functional.kl_div(right, left, log_target=True, reduction="sum")

    divergence = {
        "forward": lambda: kl(log_p, log_q),
        "reverse": lambda: kl(log_q, log_p),
        "jsd": lambda: (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
    }[options.divergence]()
    return options.alpha * cross_entropy + (1 - options.alpha) * tau**2 * divergence


def case(scale: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return {
        "hidden": draw(T, D).requires_grad_(True),
        "weight": draw(V, D).requires_grad_(True),
        "bias": draw(V).requires_grad_(True),
        "teacher_hidden": draw(T, H),
        "teacher_weight": draw(V, H),
        "label": torch.randint(0, V, (T,), generator=generator),
        "scale": scale,
    }


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_value_and_gradients_equal_plain_autograd(
    divergence: Any, alpha: float, temperature: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "head_rows", lambda *_: rows)
    x = case(0.7)
    options = LossOptions(alpha=alpha, temperature=temperature, divergence=divergence)
    leaves = [x["hidden"], x["weight"], x["bias"]]
    logits = x["scale"] * (x["hidden"] @ x["weight"].T + x["bias"])
    meant = plain(options, logits, x["teacher_hidden"] @ x["teacher_weight"].T, x["label"])
    meant_grads = torch.autograd.grad(3.0 * meant, leaves)
    targets = FullTargets(hidden_TH=x["teacher_hidden"], head=Head(weight_VD=x["teacher_weight"]))
    head = Head(weight_VD=x["weight"], bias_V=x["bias"], scale=x["scale"])
    found = distillation_loss(x["hidden"], head, x["label"], targets, options)
    grads = torch.autograd.grad(3.0 * found.total, leaves)
    assert found.total.item() == pytest.approx(meant.item(), rel=1e-12)
    for grad, meant_grad in zip(grads, meant_grads, strict=True):
        assert (grad - meant_grad).abs().max() < 1e-10


def test_without_targets_it_is_the_cross_entropy() -> None:
    x = case()
    head = Head(weight_VD=x["weight"], bias_V=x["bias"])
    found = distillation_loss(x["hidden"], head, x["label"], None, LossOptions())
    meant = plain(LossOptions(), x["hidden"] @ x["weight"].T + x["bias"], None, x["label"])
    assert found.total.item() == pytest.approx(meant.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(found.total, [x["hidden"]])
    (meant_grad,) = torch.autograd.grad(meant, [x["hidden"]])
    assert (grad - meant_grad).abs().max() < 1e-10


def coarse(x: dict[str, Any], top: int, tau: float = 1.0) -> tuple[TopTargets, Tensor, Tensor]:
    """Cached targets, and the teacher's and the student's distributions over cached tokens and one for the rest."""
    log_p = torch.log_softmax(x["teacher_hidden"] @ x["teacher_weight"].T, -1)
    log_q = torch.log_softmax((x["hidden"] @ x["weight"].T + x["bias"]) / tau, -1)
    value, index = log_p.topk(top, -1)
    joined = []
    for log_prob in (log_p, log_q):
        chosen = log_prob.gather(-1, index).exp()
        joined.append(torch.cat((chosen, 1 - chosen.sum(-1, keepdim=True)), -1))
    return TopTargets(index_TC=index, log_prob_TC=value, log_tail_T=joined[0][:, -1].log()), joined[0], joined[1]


@pytest.mark.parametrize("top", [1, 5, 40])
def test_cached_targets_are_a_coarser_view(top: int) -> None:
    x = case()
    targets, p, q = coarse(x, top)
    meant = (p * (p.log() - q.log())).sum()
    head = Head(weight_VD=x["weight"], bias_V=x["bias"])
    found = distillation_loss(x["hidden"], head, x["label"], targets, LossOptions())
    assert found.total.item() == pytest.approx(meant.item(), rel=1e-9)
    for grad, meant_grad in zip(
        torch.autograd.grad(found.total, [x["hidden"], x["weight"]]),
        torch.autograd.grad(meant, [x["hidden"], x["weight"]]),
        strict=True,
    ):
        assert (grad - meant_grad).abs().max() < 1e-9


def test_the_coarse_loss_is_below_the_full_one_by_at_most_the_stated_bound() -> None:
    x = case()
    full = plain(
        LossOptions(), x["hidden"] @ x["weight"].T + x["bias"], x["teacher_hidden"] @ x["teacher_weight"].T, x["label"]
    )
    log_p = torch.log_softmax(x["teacher_hidden"] @ x["teacher_weight"].T, -1)
    log_q = torch.log_softmax(x["hidden"] @ x["weight"].T + x["bias"], -1)
    last = 0.0
    for top in (1, 4, 16, 56):
        targets, p, q = coarse(x, top)
        head = Head(weight_VD=x["weight"], bias_V=x["bias"])
        found = distillation_loss(x["hidden"], head, x["label"], targets, LossOptions()).total
        in_tail = torch.ones(T, V, dtype=torch.bool).scatter_(-1, targets.index_TC, False)
        ratio = (log_p - log_q).masked_fill(~in_tail, -torch.inf).amax(-1)
        bound = (p[:, -1] * (ratio - (p[:, -1].log() - q[:, -1].log()))).sum()
        assert full - found + 1e-9 >= 0
        assert full - found <= bound + 1e-9
        assert found >= last - 1e-9  # more tokens see more
        last = found.item()


def test_a_temperature_with_cached_targets_is_exact_for_a_flat_tail() -> None:
    x = case()
    flat = torch.full((T, V), -2.0, dtype=torch.float64)
    flat[:, :5] = torch.randn(T, 5, dtype=torch.float64) + 3
    log_p = torch.log_softmax(flat, -1)
    value, index = log_p.topk(5, -1)
    targets = TopTargets(index_TC=index, log_prob_TC=value, log_tail_T=(1 - value.exp().sum(-1)).log())
    head = Head(weight_VD=x["weight"], bias_V=x["bias"])
    found = distillation_loss(x["hidden"], head, x["label"], targets, LossOptions(temperature=3.0)).total
    p = torch.softmax(flat / 3, -1)
    q = torch.softmax((x["hidden"] @ x["weight"].T + x["bias"]) / 3, -1)
    p, q = (torch.cat((one[:, :5], 1 - one[:, :5].sum(-1, keepdim=True)), -1) for one in (p, q))
    assert found.item() == pytest.approx(9 * (p * (p.log() - q.log())).sum().item(), rel=1e-9)


def test_a_frozen_head_gets_no_gradient_and_no_grad_mode_computes_none() -> None:
    x = case()
    head = Head(weight_VD=x["weight"].detach(), bias_V=None)
    targets = FullTargets(hidden_TH=x["teacher_hidden"], head=Head(weight_VD=x["teacher_weight"]))
    found = distillation_loss(x["hidden"], head, x["label"], targets, LossOptions())
    found.total.backward()
    assert x["hidden"].grad is not None
    with torch.no_grad():
        assert not distillation_loss(x["hidden"], head, x["label"], targets, LossOptions()).total.requires_grad


@pytest.mark.parametrize("tokens", [40, 400])
def test_no_piece_of_logits_is_larger_than_a_chunk(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither teacher's nor student's logits of all tokens exist, however many tokens there are."""
    monkeypatch.setattr(module, "head_rows", lambda *_: 4)
    seen: list[int] = []
    original = Head.logits

    def noting(self: Head, hidden: Tensor) -> Tensor:
        logits = original(self, hidden)
        seen.append(logits.numel())
        return logits

    monkeypatch.setattr(Head, "logits", noting)
    x = case()
    hidden = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    targets = FullTargets(
        hidden_TH=torch.randn(tokens, H, dtype=torch.float64), head=Head(weight_VD=x["teacher_weight"])
    )
    label = torch.randint(0, V, (tokens,))
    loss = distillation_loss(hidden, Head(weight_VD=x["weight"]), label, targets, LossOptions())
    saved = [tensor for tensor in loss.total.grad_fn.saved_tensors if tensor is not None]  # type: ignore[union-attr]
    assert max(tensor.numel() for tensor in saved) <= max(tokens * D, V * D)
    loss.total.backward()
    assert len(seen) == 2 * tokens // 4
    assert max(seen) == 4 * V
