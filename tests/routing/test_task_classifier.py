"""The classifier of prompts: its features by hand, its file, its fall-back."""

import pytest
import torch
from safetensors.torch import save_file

from moetools.errors import CheckpointError
from moetools.routing.classifier import (
    FALL_BACK,
    fit_classifier,
    judge_classifier,
    load_classifier,
    ngram_features,
)


@pytest.mark.parametrize("tasks", [("a", "b"), ("a", "b", "c")])
def test_it_learns_saves_and_loads(tasks, tmp_path):
    generator = torch.Generator().manual_seed(0)
    task_S = torch.arange(90) % len(tasks)
    centres = torch.randn(len(tasks), 12, generator=generator, dtype=torch.float64)
    features = centres[task_S] + 0.3 * torch.randn(90, 12, generator=generator, dtype=torch.float64)
    classifier = fit_classifier("ngrams", tasks, features[:60], task_S[:60], prefix=7, threshold=0.6)
    report = judge_classifier(classifier, features[60:], task_S[60:])
    assert report.accuracy == 1.0
    assert report.prompts == 30
    classifier.save(tmp_path / "c.safetensors")
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert (loaded.kind, loaded.tasks, loaded.prefix, loaded.threshold) == ("ngrams", tasks, 7, 0.6)
    for name in ("weight_GX", "mean_X", "spread_X"):
        assert torch.equal(getattr(loaded, name), getattr(classifier, name))
    # Not bit for bit: on some processors a product depends on where in memory its factors lie.
    torch.testing.assert_close(
        loaded.probabilities(features), classifier.probabilities(features), rtol=1e-12, atol=1e-12
    )
    # scikit-learn itself is the reference.
    from sklearn.linear_model import LogisticRegression

    scaled = (features - classifier.mean_X) / classifier.spread_X
    other = LogisticRegression(C=1.0, max_iter=1000, class_weight="balanced")
    other.fit(scaled[:60].numpy(), task_S[:60].numpy())
    expected = torch.from_numpy(other.predict_proba(scaled.numpy()))
    torch.testing.assert_close(classifier.probabilities(features), expected, rtol=1e-9, atol=1e-9)


def test_unsure_prompts_get_all_experts():
    features = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    task_S = torch.tensor([0, 1, 0, 1] * 5)
    classifier = fit_classifier("router", ("a", "b"), features, task_S, prefix=1, threshold=0.9999)
    assert classifier.choose(features[:2]) == [None, None]
    report = judge_classifier(classifier, features, task_S)
    assert report.confident == 0
    assert report.accuracy_confident is None
    assert report.confusion["a"] == {"a": 0, "b": 0, FALL_BACK: 10}


def test_ngrams_are_counted_by_hand():
    ids = torch.tensor([5, 9, 5, 9])

    def bucket(a, b):
        return ((a + 1) * 2654435761 + (b + 1) * 40503) % 2**32 // 2**20

    (row,) = ngram_features([ids], 3)
    expected = torch.zeros(4096, dtype=torch.float64)
    for pair in [(5, -1), (9, -1), (5, -1), (5, 9), (9, 5)]:
        expected[bucket(*pair)] += 1 / 5
    torch.testing.assert_close(row, expected)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_classifier(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is not a task classifier"):
        load_classifier(tmp_path / "x.safetensors")
