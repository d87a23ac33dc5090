"""What `test_two_processes_do_what_one_does` starts under torchrun: TEACHER STUDENT FOLDER."""

import copy
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from moetools.forward.progress import Silent
from moetools.training.data import collate
from moetools.training.distiller import Distiller, OnlineTeacher
from moetools.training.models import load_whole
from moetools.training.trainer import train
from tests.training.test_trainer import CPU, FORWARD, QUICK, sequences

transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
teacher_path, student_path, folder = map(Path, sys.argv[1:4])
teacher = load_whole(teacher_path, dtype=torch.float32, device=CPU, trainable=False)
student = load_whole(student_path, dtype=torch.float32, device=CPU, trainable=True)
made = Distiller(student, OnlineTeacher(teacher, 128), FORWARD, vocabulary=128)
untrained = copy.deepcopy(made.student)
options = replace(QUICK, steps=6, train_batch_size=2)
result = train(made, sequences(True), options, folder / "run", metrics=folder / "metrics.jsonl", progress=Silent())

# Both processes compute the same batch, so the averaged gradient of the sharded module is that of one whole one.
found = sequences(True)
batch = collate([{"ids": found.ids[number], "number": number} for number in found.training[:4]])
whole, sharded = (
    Distiller(one, OnlineTeacher(teacher, 128), FORWARD, vocabulary=128)
    for one in (copy.deepcopy(untrained), untrained)
)
for layer in sharded.student.model.layers:
    fully_shard(layer)
fully_shard(sharded)
difference = 0.0
for module in (whole, sharded):
    module(**batch)["loss"].backward()
for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
    assert isinstance(other, DTensor)
    difference = max(difference, (one.grad - other.grad.full_tensor()).abs().max().item())
if os.environ["RANK"] == "0":
    (folder / "curve.json").write_text(json.dumps(result.curve))
    (folder / "sharded.json").write_text(json.dumps(difference))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# Threads of autograd and gloo that wake while the interpreter is taken down end a process with SIGABRT, now and then.
sys.stdout.flush()
os._exit(0)
