"""Every kind of page in headless Chromium: nothing on the console, nothing that axe-core finds, hostile names as text.

See README.md here for what it needs.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moetools

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = os.environ.get("MOETOOLS_AXE")
SHOTS = os.environ.get("MOETOOLS_SHOTS")
needs_axe = pytest.mark.skipif(AXE is None, reason="MOETOOLS_AXE names no axe.min.js, see tests/pages/README.md")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, see tests/pages/README.md")
HOSTILE = "<b onclick=alert(1)>&amp;"
KINDS = ("inspect-routing", "evaluate", "compare", "route-tasks", "compress")
SCHEMES = {"dark": 0, "light": 1}
"""Of Blink's setting `preferredColorScheme`."""


@pytest.fixture(scope="module")
def pages(tiny, tmp_path_factory) -> dict[str, Path]:
    """A page of every verb that writes some, of folders of hostile names (those of tasks are refused)."""
    folder = tmp_path_factory.mktemp("pages")
    texts = []
    for seed, task in enumerate(("code", "prose")):
        file = folder / f"{seed}.safetensors"
        save_file({"input_ids": torch.randint(2, 128, (16, 16), generator=torch.Generator().manual_seed(seed))}, file)
        texts.append(f"{task}={file}")
    asked = {"data": texts, "seq_len": 16, "device": "cpu"}
    model, pages = folder / HOSTILE, {kind: folder / f"{kind}.html" for kind in KINDS}
    shutil.copytree(tiny("mixtral"), model)
    moetools.inspect_routing(model, similarity=True, html=pages["inspect-routing"], **asked)
    pruned = folder / f"{HOSTILE} pruned"
    moetools.prune_experts(model, pruned, experts="0,1,2,3", device="cpu", verify=False)
    moetools.evaluate([pruned], reference=model, html=pages["evaluate"], **asked)
    moetools.compare([pruned], reference=model, html=pages["compare"], **asked)
    moetools.route_tasks(model, folder / "out", keep=4, refit="none", verify=False, **asked)
    shutil.copy(folder / "out" / "report.html", pages["route-tasks"])
    planned = {"target_size": "60%", "target": "vllm", "plan_only": True, "probe_tokens": 64}
    moetools.compress(model, folder / "small", html=pages["compress"], **planned, **asked)
    return pages


def chromium(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    command = [str(CHROMIUM), *fixed, *options, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_on_the_console_and_names_are_text(kind, pages):
    found = chromium(pages[kind], "--dump-dom")
    assert "CONSOLE" not in found.stderr
    assert "onclick=" not in re.sub(r"&lt;.*?&gt;", "", found.stdout)
    assert "</main>" in found.stdout


@needs_axe
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing(kind, scheme, pages, tmp_path):
    """The copy has no policy, so that axe may run; all else is the page."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", pages[kind].read_text())
    report = "axe.run().then(found => { const told = document.createElement('pre'); told.id = 'axe'; "
    report += "told.textContent = JSON.stringify(found.violations); document.body.append(told); });"
    script = Path(str(AXE)).read_text().replace("</script", "<\\/script")
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</body>", f"<script>{script}</script><script>{report}</script></body>"))
    found = chromium(copy, "--dump-dom", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}")
    (told,) = re.findall(r'<pre id="axe">(.*?)</pre>', found.stdout, flags=re.DOTALL)
    violations = json.loads(told.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert not [(one["id"], one["help"], [node["html"][:120] for node in one["nodes"][:3]]) for one in violations]


@pytest.mark.skipif(SHOTS is None, reason="MOETOOLS_SHOTS names no folder")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_to_look_at(kind, width, scheme, pages):
    file = Path(str(SHOTS)) / f"{kind}-{width}-{scheme}.png"
    scheme_option = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    chromium(pages[kind], f"--window-size={width},1600", scheme_option, f"--screenshot={file}")
    assert file.stat().st_size > 1000
