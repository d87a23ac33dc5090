"""What is predicted from single choices: exact where it was measured, a law that is recovered from its own points."""

import math
from dataclasses import replace

import pytest

from moetools.verbs.compress.building import _measured_before
from moetools.verbs.compress.candidates import Bits, Candidate
from moetools.verbs.compress.prediction import BASE, PLAIN, Prediction, Probe

W8, W6, W5 = (Bits(experts=f"w{width}a16") for width in (8, 6, 5))
W4, W3 = Bits(experts="w4a16"), Bits(experts="w3a16", attention="w8a16")


def plan(method: str, experts: int, bits: Bits) -> Candidate:
    return Candidate(method=method, experts=experts, bits=bits, nbytes=1)


def law(probe: Probe) -> float:
    """A loss that follows the formula, with c = 0.7."""
    fewer = 0.0 if probe.method == "none" else 0.01 * (8 - probe.experts) ** 1.5
    bits = {PLAIN: 0.0, W4: 0.004, W3: 0.02}[probe.bits]
    return fewer + bits + 0.7 * math.sqrt(fewer * bits)


def measured(candidates: list[Candidate]) -> Prediction:
    prediction = Prediction(num_experts=8)
    return replace(prediction, measured={probe: law(probe) for probe in prediction.single_probes(candidates)})


def test_a_law_of_that_form_is_recovered():
    counts = [7, 6, 5, 4, 3]
    candidates = [plan(method, count, bits) for method in ("prune", "merge") for count in counts for bits in (W4, W3)]
    prediction = measured(candidates)
    # Three counts for each method, and either scheme alone.
    assert len(prediction.measured) == 2 * 3 + 2
    joint = prediction.joint_probes(candidates, 2)
    assert all(probe.method != "none" and probe.bits != PLAIN for probe in joint)
    fitted = prediction.fitted({probe: law(probe) for probe in joint})
    assert fitted.interaction == pytest.approx(0.7, abs=1e-9)
    for one in candidates:
        assert fitted.kl(one) == pytest.approx(law(Probe(one.method, one.experts, one.bits)), rel=1e-9)


def test_coded_experts_are_interpolated_and_their_parts_add():
    rates = {0.5: 0.3, 1.0: 0.1, 2.0: 0.01}
    coded = [Bits(experts=f"sub1:{rate:g}", attention="sub1:4", embeddings="sub1:3") for rate in rates]
    candidates = [plan("none", 8, bits) for bits in coded]
    alone = {replace(BASE, experts=f"sub1:{rate:g}"): kl for rate, kl in rates.items()}
    parts = {BASE: 0.001, replace(BASE, attention="sub1:4"): 0.003, replace(BASE, embeddings="sub1:3"): 0.006}
    prediction = Prediction(num_experts=8)
    asked = prediction.single_probes(candidates)
    assert {probe.bits for probe in asked} == {*alone, *parts}
    prediction = replace(prediction, measured={probe: {**alone, **parts}[probe.bits] for probe in asked})
    assert [prediction.kl(one) for one in candidates] == pytest.approx([kl + 0.002 + 0.005 for kl in rates.values()])
    between = replace(coded[0], experts="sub1:1.5")
    assert prediction.kl(plan("none", 8, between)) == pytest.approx(math.sqrt(0.1 * 0.01) + 0.007)


def test_fine_widths_follow_the_law_of_rounding():
    candidates = [plan("none", 8, bits) for bits in (W8, W6, W5, W4)]
    prediction = Prediction(num_experts=8)
    asked = prediction.single_probes(candidates)
    assert {probe.bits for probe in asked} == {W5, W4}
    prediction = replace(prediction, measured={probe: {W5: 0.016, W4: 0.05}[probe.bits] for probe in asked})
    assert [prediction.kl(one) for one in candidates] == pytest.approx([0.016 / 64, 0.016 / 4, 0.016, 0.05])


def test_what_more_text_brings_is_foreseen():
    """Losses of the form exp(a + b / tokens), with other a and b for reductions than for bits."""

    def at(probe: Probe, tokens: int) -> float:
        excess = 300 if probe.method == "none" else 800 if probe.experts == 4 else 2000
        return law(probe) * math.exp(excess / tokens)

    candidates = [plan(method, count, bits) for method in ("prune", "merge") for count in (6, 4) for bits in (W4, W3)]
    prediction = Prediction(num_experts=8)
    alone = prediction.single_probes(candidates)
    prediction = replace(prediction, measured={probe: at(probe, 1000) for probe in alone})
    again = prediction.learning_probes()
    assert {probe.method == "none" for probe in again} == {True, False}
    learned = prediction.learned({probe: at(probe, 4000) for probe in again}, (1000, 4000, 50_000))
    for probe in alone:
        one = plan(probe.method, probe.experts, probe.bits)
        fewer = learned.kl(one)
        assert fewer == pytest.approx(at(probe, 50_000), rel=1e-9)
    # Losing more on more text is chance.
    worse = prediction.learned({probe: 2 * at(probe, 1000) for probe in again}, (1000, 4000, 50_000))
    assert ({*worse.reduction.values()}, worse.rounding) == ({1}, 1)


def test_what_was_measured_of_a_plan_outweighs_the_formula():
    one = plan("merge", 4, W4)
    prediction = measured([one])
    (probe,) = prediction.joint_probes([one, plan("merge", 8, PLAIN)], 3)
    other = Probe("merge", 4, W3)
    fitted = replace(prediction, measured={**prediction.measured, other: 0.5}).fitted({probe: 0.2})
    assert fitted.kl(one) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"settings": "s", "kl": {"a": 0.5}}', {"a": 0.5}),
        ('{"settings": "other", "kl": {"a": 0.5}}', {}),
        ('{"settings": "s", "kl": {"a": "0.5"}}', {}),
        ('{"settings": "s", "kl": {"a": NaN}}', {}),
        ('{"settings": "s"}', {}),
        ("[]", {}),
        ('{"settings": "s", "kl": {', {}),
    ],
)
def test_damaged_measurements_are_measured_again(text, found, tmp_path):
    (tmp_path / "probes.json").write_text(text)
    assert _measured_before(tmp_path / "probes.json", "s") == found
    assert _measured_before(tmp_path / "missing.json", "s") == {}
