"""A checkpoint trained towards a teacher's predictions: one that exists, or one that is made first."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from moetools.checkpoint.durable import write_durably
from moetools.checkpoint.folder import read_json_object
from moetools.checkpoint.reader import Checkpoint, open_checkpoint
from moetools.checkpoint.shards import write_tensors
from moetools.formats.reader import PackedCheckpoint, open_model
from moetools.forward.evaluate import Evaluator
from moetools.forward.memory import MemoryPlan
from moetools.forward.options import ForwardOptions
from moetools.forward.progress import Progress
from moetools.forward.streaming import StreamedModel
from moetools.pipeline.carry_out import stage_checkpoint
from moetools.pipeline.work import Finished, Outcome, Unit, Work, layers_of
from moetools.text.options import DataOptions, load_tokens
from moetools.text.tokens import TokenBatch, TokenData, load_tokenizer, pad_right
from moetools.training.cache import CachedTeacher
from moetools.training.data import Sequences
from moetools.training.distiller import Distiller, OnlineTeacher, Teacher
from moetools.training.models import check_head, common_vocabulary, load_dequantized, load_whole
from moetools.training.processes import main_process_first, wait_for_all
from moetools.training.trainer import TrainResult, train
from moetools.verbs.evaluate.verb import check_same_tokenizer
from moetools.verbs.train.plan import StudentTraining, TrainingPlan
from moetools.verbs.train.report import TrainingReport
