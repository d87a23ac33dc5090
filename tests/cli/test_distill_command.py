"""`moetools distill`: its options reach the verb."""

from pathlib import Path
from typing import Any


def test_options_reach_the_verb(moetools, stub, report):
    seen: dict[str, Any] = {}

    def distill(teacher, out, data, forward, options, *, command, progress):
        seen.update(teacher=teacher, out=out, data=data, forward=forward, options=options, command=command)
        return report

    from moetools.verbs.distill.verb import DistillOptions

    stub("distill.verb", distill=distill, DistillOptions=DistillOptions)
    line = [
        "distill",
        "moe",
        "out",
        "--data",
        "a=a.txt",
        "--calibration",
        "c=c.txt",
        "--init",
        "do-acp",
        "--width",
        "7",
    ]
    line += ["--layers", "3", "--scaling", "marginal", "--local-steps", "9", "--max-minutes", "15", "--train", "all"]
    line += ["--alpha", "0.25", "--temperature", "2", "--divergence", "jsd", "--teacher-cache", "cache", "--seed", "5"]
    line += ["--train-baseline", "scratch", "--accumulate", "4", "--resume", "--seq-len", "128", "--samples", "30"]
    done = moetools(*line)
    assert done.code == 0, done.err
    options = seen["options"]
    assert (seen["teacher"], seen["out"], seen["data"].samples) == (Path("moe"), Path("out"), 30)
    assert (options.make.init, options.make.width, options.make.layers) == ("do-acp", 7, 3)
    assert (options.make.scaling, options.make.local_steps, options.make.seed) == ("marginal", 9, 5)
    assert (options.calibration.data, options.calibration.samples) == (["c=c.txt"], None)
    loop = options.training.train
    assert (loop.minutes, loop.steps, loop.accumulate, loop.seed) == (15, None, 4, 5)
    assert (loop.loss.alpha, loop.loss.temperature, loop.loss.divergence) == (0.25, 2, "jsd")
    assert (options.training.cache, options.training.baseline) == (Path("cache"), "scratch")
    assert options.resume
    assert seen["command"].startswith("moetools distill moe out --data a=a.txt")


def test_without_the_warm_start_there_are_no_local_steps(moetools, stub, report):
    seen: list[Any] = []
    from moetools.verbs.distill.verb import DistillOptions

    def distill(*args, **_):
        seen.append(args[4])
        return report

    stub("distill.verb", distill=distill, DistillOptions=DistillOptions)
    assert moetools("distill", "moe", "out", "--data", "a.txt", "--init", "mean", "--no-warm-start").code == 0
    assert seen[0].make.local_steps == 0
    assert seen[0].calibration is None
    assert not seen[0].training.train.wanted


def test_only_the_first_process_speaks(moetools, stub, report, monkeypatch):
    from moetools.verbs.distill.verb import DistillOptions

    stub("distill.verb", distill=lambda *_, **__: report, DistillOptions=DistillOptions)
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert bool(moetools("distill", "moe", "out", "--data", "a.txt").out) is said
