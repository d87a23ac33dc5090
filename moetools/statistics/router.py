"""Router behaviour: mean probabilities, entropy, z-loss and gate mass, per task."""

import torch
from torch import Tensor
from torch.nn import functional

from moetools.statistics.base import LayerShape, RoutedBatch, State, Statistic, ratio


class Router(Statistic):
    """Sums over the tokens of each task g of what the router computed from its logits l_e.

    P_e = softmax(l)_e, or sigmoid(l_e) / sum_j sigmoid(l_j) for routers that score by sigmoid (`LayerShape.scoring`);
    entropy H = -sum_e P_e ln P_e in nats; z = logsumexp(l), always from the raw logits.

    With f_e the `share` of the statistic "load", the balance loss is E * sum_e f_e * mean P_e. Its value for perfect
    balance is 1, because f here is normalised over slots and sums to 1 (some codebases let it sum to K).

    Quantities:
        probability [G, E], entropy [G], z_squared [G] fp64: sums over tokens of P_e, H and z^2.
        gate_mass [G, E] fp64: sum over slots of the weight g_e(x) that the model really used.
        tokens [G] int64: tokens of each task.
        sigmoid [] int64: 1 for routers that score by sigmoid.
        mean_probability [G, E], mean_entropy [G], z_loss [G] fp64: the sums divided by tokens.

    Sources: balance loss, Switch Transformer (arXiv 2101.03961, section 2.2); z-loss, ST-MoE (arXiv 2202.08906,
    section 3.3).
    """

    name = "router"
    reductions = {
        "probability": "sum",
        "entropy": "sum",
        "z_squared": "sum",
        "gate_mass": "sum",
        "tokens": "sum",
        "sigmoid": "max",
    }

    def init(self, shape: LayerShape, device: torch.device) -> State:
        tasks, experts = shape.num_tasks, shape.num_experts

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.float64, device=device)

        return {
            "probability": zeros(tasks, experts),
            "entropy": zeros(tasks),
            "z_squared": zeros(tasks),
            "gate_mass": zeros(tasks, experts),
            "tokens": torch.zeros(tasks, dtype=torch.int64, device=device),
            "sigmoid": torch.tensor(int(shape.scoring == "sigmoid"), device=device),
        }

    def update(self, state: State, batch: RoutedBatch) -> None:
        logits_TE = batch.router_logits_TE.float()
        # softmax(log sigmoid(l)) is sigmoid(l) / sum sigmoid(l); a tensor as the switch costs no host sync.
        score_TE = torch.where(state["sigmoid"] > 0, functional.logsigmoid(logits_TE), logits_TE)
        probability_TE = score_TE.softmax(1)
        batch.add_by_task(state["probability"], probability_TE)
        batch.add_by_task(state["entropy"], torch.special.entr(probability_TE).sum(1))
        batch.add_by_task(state["z_squared"], logits_TE.logsumexp(1).square())
        batch.add_by_task_and_expert(state["gate_mass"], batch.slots.weight_S)
        batch.add_by_task(state["tokens"], torch.ones_like(batch.task_T))

    def finalize(self, state: State) -> State:
        tokens_G = state["tokens"]
        return {
            **state,
            "mean_probability": ratio(state["probability"], tokens_G[:, None]),
            "mean_entropy": ratio(state["entropy"], tokens_G),
            "z_loss": ratio(state["z_squared"], tokens_G),
        }


STATISTIC = Router()
