"""`experts` in every form that the command line, Python and recipes have for it."""

from pathlib import Path

import pytest
import torch

from moetools.errors import UserError
from moetools.verbs.catalogue import VERBS
from moetools.verbs.reduce.expert_list import listed_experts

PRUNE = next(verb for verb in VERBS if verb.name == "prune-experts")


@pytest.mark.parametrize(
    ("experts", "every", "layers"),
    [
        ([6, 0, 5], (6, 0, 5), {}),
        ((6, 0), (6, 0), {}),
        ({5, 0}, (0, 5), {}),
        (range(3), (0, 1, 2), {}),
        (torch.tensor([3, 1]), (3, 1), {}),
        ({0: [1, 2], "1": torch.tensor([0, 3])}, None, {0: (1, 2), 1: (0, 3)}),
        ("6, 0", (6, 0), {}),
        ("[6, 0]", (6, 0), {}),
        ('{"0": [1], "1": [2]}', None, {0: (1,), 1: (2,)}),
        (Path("experts.json"), (7, 2), {}),
        ("experts.json", (7, 2), {}),
    ],
    ids=str,
)
def test_lists_of_experts(
    experts: object, every: tuple | None, layers: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experts.json").write_text("[7, 2]")
    options, *_ = PRUNE.instances({"experts": experts})
    found = listed_experts("explicit", options.experts)
    assert found is not None
    assert (found.every, found.layers) == (every, layers)


@pytest.mark.parametrize(
    "experts", [[0, 1.5], [True, False], ["0"], [[0, 1]], {0: 3}, {"a": [0]}, 5, torch.tensor([0.5])], ids=str
)
def test_what_is_no_list_of_experts(experts: object) -> None:
    with pytest.raises(UserError, match="legal: str, list of int, dict of lists of int, None"):
        PRUNE.instances({"experts": experts})
    with pytest.raises(UserError, match=r"not a list|neither a list"):
        listed_experts("explicit", type(experts)() if isinstance(experts, dict) else [])
