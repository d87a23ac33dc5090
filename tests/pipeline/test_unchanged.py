"""A model that is written again while a command measures it: no numbers of a mixture of two models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moetools
from moetools.errors import CheckpointError
from moetools.forward.stock import StockModel


@pytest.mark.parametrize("verb", ["evaluate", "inspect_routing"])
@pytest.mark.parametrize("change", ["config.json", "model.safetensors"])
def test_what_changes_while_it_is_measured_is_refused(verb, change, tiny, tmp_path: Path, monkeypatch) -> None:
    model = shutil.copytree(tiny("mixtral", num_hidden_layers=2), tmp_path / "model")
    ids = torch.randint(2, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "text.safetensors")
    asked = {"data": tmp_path / "text.safetensors", "seq_len": 16, "device": "cpu"}
    read, file = StockModel.read_layer, model / change

    def reading(self, index, *args, **more):
        if index == 1 and file.suffix == ".json":
            file.write_text(json.dumps({**json.loads(file.read_text()), "changed": True}))
        elif index == 1:
            file.write_bytes(file.read_bytes()[:-1] + b"\x01")
        return read(self, index, *args, **more)

    getattr(moetools, verb)(model, **asked)
    monkeypatch.setattr(StockModel, "read_layer", reading)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        getattr(moetools, verb)(model, **asked)
