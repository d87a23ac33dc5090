"""Settings of transformers' Trainer for our options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from moetools.errors import UserError
from moetools.training.distiller import Distiller
from moetools.training.options import TrainOptions, processes


def event_files(folder: Path | None) -> list[TrainerCallback]:
    if folder is None:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(log_dir=str(folder)))]


def trainer_arguments(options: TrainOptions, folder: Path, steps: int, distiller: Distiller) -> TrainingArguments:
    on_cpu = next(distiller.parameters()).device.type == "cpu"
    if options.gradient_checkpointing:
        # Renamed in transformers 5.23.
        name = "activation_checkpointing_enable"
        enable = getattr(distiller.student, name, None) or distiller.student.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    sharding: dict[str, Any] = {}
    if options.fsdp and on_cpu:
        raise UserError("`fsdp` shards over GPUs; on a CPU several processes each hold the whole student")
    if options.fsdp:
        wrapped = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": list(distiller.student._no_split_modules),
            "state_dict_type": "FULL_STATE_DICT",
        }
        sharding = {"fsdp": True, "fsdp_config": wrapped}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.train_batch_size,
        gradient_accumulation_steps=options.accumulate,
        max_grad_norm=1.0,
        bf16=options.bf16,
        use_cpu=on_cpu,
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=options.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=[],
        **({"ddp_backend": "gloo"} if on_cpu and processes() > 1 else {}),
        **sharding,
    )
