"""What serve-check says of engines: real ones in processes of their own, and made-up ones that fail in every way."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moetools
from moetools.errors import CheckpointError, GateError, UserError
from moetools.verbs.serve.engines import ENGINES, RefusedError
from moetools.verbs.serve.report import EngineResult, ServeReport

Fake = Callable[[str], str]
SAME = {"device": "cpu"}


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny("mixtral", dtype=torch.float32)


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """A "Python" that has every module, and whose engine does what the given lines do to `request` and `answer`."""

    def make(lines: str) -> str:
        path = tmp_path / f"python-{len(list(tmp_path.iterdir()))}"
        path.write_text(
            f"#!{sys.executable}\nimport json, os, sys, time\n"
            "if sys.argv[1] == '-c':\n    sys.exit(0)\n"
            "request, answer = json.load(open(sys.argv[-2])), {'version': '1'}\n"
            f"{lines}\njson.dump(answer, open(sys.argv[-1], 'w'))\n"
        )
        path.chmod(0o755)
        return str(path)

    return make


def only(report: ServeReport) -> EngineResult:
    (found,) = report.engines
    return found


def failing(model: Path, *engines: str, **options: Any) -> tuple[ServeReport, str]:
    with pytest.raises(GateError) as caught:
        moetools.serve_check(model, engine=list(engines), **SAME, **options)
    return caught.value.result, caught.value.message


def test_stock_transformers_agrees_and_what_is_not_here_is_said(model: Path, stock) -> None:
    report = moetools.serve_check(model, **SAME)
    by_name = {one.engine: one for one in report.engines}
    assert set(by_name) == set(ENGINES)
    assert by_name["transformers"].verdict == by_name["moetools.hf"].verdict == "agrees"
    assert by_name["transformers"].mean < 1e-6
    assert by_name["sglang"].verdict == "not installed"
    assert sys.executable in by_name["sglang"].said
    assert json.loads(json.dumps(report.to_json()))["tokens"] == 32
    assert report.tables()[0].rows[0][3] == "agrees"


def test_the_scores_are_those_of_a_plain_loop(model: Path, stock, fake: Fake) -> None:
    """d_i = |log p(t_i) - ours|: an engine that answers with zeros shows what ours are."""
    report, _ = failing(model, "transformers=" + fake("answer['scores'] = [0.0] * (len(request['ids']) - 1)"))
    ids = torch.randint(128, (32,), generator=torch.Generator().manual_seed(0))
    log_probs = stock(model)(ids[None]).logits[0].detach().double().log_softmax(-1)
    expected = torch.tensor([log_probs[place - 1, ids[place]] for place in range(1, 32)])
    assert only(report).mean == pytest.approx(-expected.mean().item(), rel=1e-5)
    assert only(report).largest == pytest.approx(-expected.min().item(), rel=1e-5)
    assert report.spread == pytest.approx(expected.std().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("lines", "verdict", "said"),
    [
        ("answer = {'error': 'ValueError: no kernel'}", "fails", "ValueError: no kernel"),
        (
            "print('starting'); print('OSError: no file'); print('bye'); os._exit(7)",
            "fails",
            "code 7: OSError: no file",
        ),
        ("print('(Worker pid=7) ERROR 11-27 [a.py:1] ValueError: no'); os._exit(1)", "fails", "code 1: ValueError: no"),
        ("os.kill(os.getpid(), 11)", "fails", "code -11: nothing was said"),
        ("time.sleep(60)", "fails", "took over 1 s"),
        ("answer['scores'] = [float('nan')] * (len(request['ids']) - 1)", "differs", "differs by nan nats"),
        ("answer['scores'] = [-4.0] * (len(request['ids']) - 1)", "differs", "nats per token"),
    ],
)
def test_every_way_to_fail_is_an_answer(lines: str, verdict: str, said: str, model: Path, fake: Fake) -> None:
    report, message = failing(model, "transformers=" + fake(lines), timeout=1 if "sleep" in lines else 60)
    assert only(report).verdict == verdict
    assert said in message
    assert message.startswith(f"transformers {verdict}")


def test_packed_in_our_own_format_stock_transformers_is_not_tried(model: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    moetools.quantize(
        model, packed, method="rtn", scheme="w2a16", group_size=8, format="moetools", verify=False, **SAME
    )
    report, message = failing(packed, "transformers", "moetools.hf")
    first, second = report.engines
    assert (first.verdict, second.verdict) == ("refused", "agrees")
    assert "moetools.hf loads it" in message
    assert second.mean < 1e-5


def test_wrong_weights_are_seen(model: Path, rewrite, tmp_path: Path) -> None:
    """Two experts that changed places without their router rows: what an engine with wrong names would compute."""
    names = [f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in (0, 1)]
    other = rewrite(model, lambda tensors: tensors | {names[0]: tensors[names[1]], names[1]: tensors[names[0]]})
    script = tmp_path / "python"
    inside = Path(moetools.__file__).parent / "verbs/serve/_engine_process.py"
    script.write_text(
        f"#!{sys.executable}\nimport json, runpy, sys\nif sys.argv[1] == '-c':\n    sys.exit(0)\n"
        f"request = json.load(open(sys.argv[-2]))\nrequest['path'] = {str(other)!r}\n"
        f"json.dump(request, open(sys.argv[-2], 'w'))\nsys.argv = [{str(inside)!r}, *sys.argv[-2:]]\n"
        f"sys.path.insert(0, '')\nrunpy.run_path({str(inside)!r}, run_name='__main__')\n"
    )
    script.chmod(0o755)
    report, _ = failing(model, f"transformers={script}", tolerance=0.001)
    assert only(report).verdict == "differs"
    assert only(report).share > 0.001


def test_a_tokenizer_of_an_engine_is_compared(fake: Fake, tmp_path: Path) -> None:
    demo = Path(moetools.__file__).parent / "demo/model"
    good = "answer['ids'] = request['ids']; answer['scores'] = [0.0] * (len(request['ids']) - 1)"
    report, _ = failing(demo, "transformers=" + fake(good), prompt="Once upon a time there was a king")
    assert only(report).same_tokens is True
    report, message = failing(demo, "transformers=" + fake(good.replace("request['ids'];", "[1, 2];")))
    assert only(report).same_tokens is False
    assert "tokenizes the prompt as [1, 2], not [" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": ["vlm"]}, "engine 'vlm'"),
        ({"engine": ["vllm=/no/python"]}, "no program there"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
        ({"timeout": 0}, "timeout=0"),
        ({"prompt": " "}, "`prompt` is empty"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_opened(options: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        moetools.serve_check(tmp_path / "none", **options, **SAME)


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    demo = Path(moetools.__file__).parent / "demo/model"
    with pytest.raises(UserError, match="1 tokens"):
        moetools.serve_check(demo, prompt="a", engine=["transformers"], **SAME)


def test_a_prompt_that_cannot_be_tokenized_is_not_passed_over(model: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        moetools.serve_check(model, prompt="Once upon a time", engine=["transformers"], **SAME)


def test_forms(model: Path, tmp_path: Path) -> None:
    """Which file or folder an engine gets."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    with pytest.raises(RefusedError, match=r"no \.gguf file"):
        ENGINES["llama.cpp"].form(folder)
    for number in (2, 1, 3):
        (folder / f"out-0000{number}-of-00003.gguf").touch()
    assert ENGINES["llama.cpp"].form(folder).name == "out-00001-of-00003.gguf"
    assert ENGINES["mlx"].form(folder) == folder
    (folder / "mlx").mkdir()
    (folder / "mlx/config.json").write_text("{}")
    assert ENGINES["mlx"].form(folder) == folder / "mlx"
    config = json.loads((folder / "config.json").read_text()) | {"moetools_experts_per_layer": {"0": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="different numbers of experts"):
        ENGINES["vllm"].form(folder)
