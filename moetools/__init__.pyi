# Generated: python -m moetools.api.reference --stubs > stubs && mv stubs moetools/__init__.pyi
# A test fails when it is out of date.
# ruff: noqa: A002
"""moetools: make trained Mixture-of-Experts language models cheap to serve, and prove the result.

Every verb of the command line is a function: `moetools.prune_experts("MODEL", "OUT", keep=8, data="code.jsonl")`. They
return the report that the command prints, and raise `MoetoolsError`. Importing this imports no torch.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, TypeAlias

from moetools.errors import MoetoolsError as MoetoolsError
from moetools.verbs.compare.report import Comparison
from moetools.verbs.compress.report import CompressReport
from moetools.verbs.demo import DemoReport
from moetools.verbs.distill.report import DistillReport
from moetools.verbs.evaluate.report import Evaluation
from moetools.verbs.inspect.routing_report import RoutingReport
from moetools.verbs.inspect.summary import ModelSummary
from moetools.verbs.place.report import PlaceReport
from moetools.verbs.quantize.report import QuantizationReport
from moetools.verbs.reduce.report import ReduceReport
from moetools.verbs.route.report import RouteReport
from moetools.verbs.run.report import RunReport
from moetools.verbs.serve.report import ServeReport

_Path: TypeAlias = str | PathLike[str]
_Texts: TypeAlias = _Path | Sequence[_Path] | Mapping[str, _Path]

__version__: str

def inspect(model: _Path) -> ModelSummary:
    """Show what a checkpoint is made of, from config.json and safetensors headers alone.

    Family, layers, experts, parameters (total and active per token), bytes by part and dtype, memory to serve.

    Args:
        model: Folder of the checkpoint (Hugging Face layout, safetensors).

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def inspect_routing(
    model: _Path,
    *,
    compare: _Path | None = None,
    html: _Path | None = None,
    plots: _Path | None = None,
    similarity: bool = False,
    stats: _Path | None = None,
    save_stats: _Path | None = None,
    devices: int | None = None,
    nodes: int = 1,
    replicas: int = 0,
    expert_location: _Path | None = None,
    data: _Texts = [],
    seq_len: int = 512,
    samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    tokenizer: _Path | None = None,
    column: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> RoutingReport:
    """Measure how the routers use their experts, per layer and per task.

    Load, entropy, skew, balance loss, z-loss, and experts that get too little.

    Args:
        model: Folder of the checkpoint (Hugging Face layout, safetensors).
        compare: Another checkpoint of the same model: which share of its routers' choices agrees, layer by layer.
        html: Also write the report as one self-contained page: advice, pictures and all tables.
        plots: Also write every picture of the page as SVG and PNG into a folder that is new or empty.
        similarity: Also measure how alike experts are, and show the clusters that merging by similarity would make.
        stats: Take statistics saved by `save_stats` instead of measuring them.
        save_stats: Save the measured statistics for later runs.
        devices: Plan which of so many devices holds which experts (expert parallelism), judged on held-out text.
        nodes: Machines the devices belong to; router groups stay on one machine where they can be dealt out evenly.
        replicas: Further copies of busy experts that a layer may have, over all devices.
        expert_location: Write the plan as SGLang reads it (its option init-expert-location).
        data: Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a
            .safetensors file. Repeat it for several tasks; the name may be left out. A path, several, or a mapping of
            names to paths.
        seq_len: Tokens per sequence.
        samples: Sequences per task, or all; 512 sequences of 512 tokens, shared evenly among the tasks, if not given.
        batch_size: Sequences per batch; about 2,048 tokens if not given.
        pack: Join documents and cut windows of `seq_len` tokens, or pad one sequence per document.
        shuffle: Draw documents in seeded random order instead of file order.
        seed: Seed of everything that is drawn at random.
        tokenizer: Folder of the tokenizer; the model's own if not given.
        column: Key or column that holds the text or the messages, where a record has several or calls it otherwise.
        strict: Refuse the first record that cannot be used, instead of leaving it out.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def prune_experts(
    model: _Path,
    out: _Path,
    *,
    keep: int | None = None,
    method: str | None = None,
    experts: _Path | Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    refit: str | None = None,
    ratio: float | None = None,
    sequential: bool | None = None,
    allow_uneven: bool = False,
    heal: int = 0,
    heal_train: str = "all",
    heal_data: _Texts = [],
    mtp: str | None = None,
    output_format: str | None = None,
    stats: _Path | None = None,
    save_stats: _Path | None = None,
    data: _Texts = [],
    seq_len: int = 512,
    samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    tokenizer: _Path | None = None,
    column: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> ReduceReport:
    """Write a checkpoint with fewer experts: the ones a method scores lowest are dropped.

    Args:
        model: Folder of the checkpoint (Hugging Face layout, safetensors).
        out: Folder to write; must not exist.
        keep: Experts to keep in every layer.
        method: One of ean, easy-ep, frequency, gate-mass, naee, random, reap, explicit, auto. reap if not given,
            explicit with `experts`.
        experts: Experts to keep: 0,2,5 for every layer, or a JSON file with such a list or with one per layer.
        refit: joint: solve all down projections of a layer anew for the original's hidden states; none: leave them. The
            method's own way if not given.
        ratio: Share of experts to remove, 0 < R < 1; E experts become (1 - R) * E, rounded.
        sequential: Measure behind the already compressed layers, or once on the original.
        allow_uneven: Spread the experts over the layers by what they contribute; the output then loads with moetools.hf
            only.
        heal: Train the result for that many steps of 4 sequences towards the original's predictions; both models must
            fit in memory.
        heal_train: router: the routers alone; experts: routers and experts; all: every parameter.
        heal_data: Text to heal on, in random order and whatever `samples`; all the text of `data` if not given. A path,
            several, or a mapping of names to paths.
        mtp: Multi-token-prediction layers. follow: their experts are reduced like any layer's; drop: they are left out;
            keep: as they are, if that loads. follow if not given, drop where that cannot be.
        output_format: Weights of a packed input. same: every kept tensor byte for byte as it lies there; bf16: decoded.
            same if not given, where the command changes no packed weight.
        stats: Take statistics saved by `save_stats` instead of measuring them.
        save_stats: Save the measured statistics for later runs.
        data: Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a
            .safetensors file. Repeat it for several tasks; the name may be left out. A path, several, or a mapping of
            names to paths.
        seq_len: Tokens per sequence.
        samples: Sequences per task, or all; 512 sequences of 512 tokens, shared evenly among the tasks, if not given.
        batch_size: Sequences per batch; about 2,048 tokens if not given.
        pack: Join documents and cut windows of `seq_len` tokens, or pad one sequence per document.
        shuffle: Draw documents in seeded random order instead of file order.
        seed: Seed of everything that is drawn at random.
        tokenizer: Folder of the tokenizer; the model's own if not given.
        column: Key or column that holds the text or the messages, where a record has several or calls it otherwise.
        strict: Refuse the first record that cannot be used, instead of leaving it out.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        overwrite: Replace `out` if it is a checkpoint, and throw away what an interrupted run left.
        resume: Go on from the last finished layer of an interrupted run.
        dry_run: Check everything and show sizes, memory and time; write nothing. The time is told from the first
            layers, made on a little of the text.
        verify: Reload `out` with stock transformers and compare it with what was meant.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def merge_experts(
    model: _Path,
    out: _Path,
    *,
    to: int | None = None,
    method: str | None = "joint",
    combine: str | None = None,
    rank: float | None = None,
    router: str | None = None,
    refit: str | None = None,
    align: bool | None = None,
    ratio: float | None = None,
    sequential: bool | None = None,
    allow_uneven: bool = False,
    heal: int = 0,
    heal_train: str = "all",
    heal_data: _Texts = [],
    mtp: str | None = None,
    output_format: str | None = None,
    stats: _Path | None = None,
    save_stats: _Path | None = None,
    data: _Texts = [],
    seq_len: int = 512,
    samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    tokenizer: _Path | None = None,
    column: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> ReduceReport:
    """Write a checkpoint with fewer experts: similar ones are merged into one.

    `to=1` makes every MoE layer dense.

    Args:
        model: Folder of the checkpoint (Hugging Face layout, safetensors).
        out: Folder to write; must not exist.
        to: Experts to end with in every layer; 1 makes the layers dense.
        method: One of average, frequency-average, hc-smoe, joint, m-smoe, mergemoe, ream, saliency-average, sub-moe,
            auto.
        combine: average: sum the members' weights; subspace: sum them in the directions they share; neurons: keep the
            members' neurons the layer's output needs most. The method's own way if not given.
        rank: Share of the directions that `combine=subspace` keeps.
        router: Router rows of new experts: mean or centroid of the members', or fitted to their joint logit.
        refit: joint: solve all down projections of a layer anew for the original's hidden states; members: each for its
            members' mean output; none: leave them. The method's own way if not given.
        align: Put the members' neurons in one order before they are averaged.
        ratio: Share of experts to remove, 0 < R < 1; E experts become (1 - R) * E, rounded.
        sequential: Measure behind the already compressed layers, or once on the original.
        allow_uneven: Spread the experts over the layers by what they contribute; the output then loads with moetools.hf
            only.
        heal: Train the result for that many steps of 4 sequences towards the original's predictions; both models must
            fit in memory.
        heal_train: router: the routers alone; experts: routers and experts; all: every parameter.
        heal_data: Text to heal on, in random order and whatever `samples`; all the text of `data` if not given. A path,
            several, or a mapping of names to paths.
        mtp: Multi-token-prediction layers. follow: their experts are reduced like any layer's; drop: they are left out;
            keep: as they are, if that loads. follow if not given, drop where that cannot be.
        output_format: Weights of a packed input. same: every kept tensor byte for byte as it lies there; bf16: decoded.
            same if not given, where the command changes no packed weight.
        stats: Take statistics saved by `save_stats` instead of measuring them.
        save_stats: Save the measured statistics for later runs.
        data: Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a
            .safetensors file. Repeat it for several tasks; the name may be left out. A path, several, or a mapping of
            names to paths.
        seq_len: Tokens per sequence.
        samples: Sequences per task, or all; 512 sequences of 512 tokens, shared evenly among the tasks, if not given.
        batch_size: Sequences per batch; about 2,048 tokens if not given.
        pack: Join documents and cut windows of `seq_len` tokens, or pad one sequence per document.
        shuffle: Draw documents in seeded random order instead of file order.
        seed: Seed of everything that is drawn at random.
        tokenizer: Folder of the tokenizer; the model's own if not given.
        column: Key or column that holds the text or the messages, where a record has several or calls it otherwise.
        strict: Refuse the first record that cannot be used, instead of leaving it out.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        overwrite: Replace `out` if it is a checkpoint, and throw away what an interrupted run left.
        resume: Go on from the last finished layer of an interrupted run.
        dry_run: Check everything and show sizes, memory and time; write nothing. The time is told from the first
            layers, made on a little of the text.
        verify: Reload `out` with stock transformers and compare it with what was meant.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def route_tasks(
    model: _Path,
    out: _Path,
    *,
    keep: int | None = None,
    top_p: float | None = None,
    score: str = "output",
    union: str | Sequence[str] = [],
    refit: str | None = None,
    tune_router: int = 0,
    test: _Texts = [],
    level: str | Sequence[str] = [],
    pool: str | Sequence[str] = [],
    classifier: str = "ngrams",
    prefix: int = 64,
    threshold: float = 0.8,
    mtp: str | None = None,
    output_format: str | None = None,
    report: bool = True,
    plots: _Path | None = None,
    data: _Texts = [],
    seq_len: int = 512,
    samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    tokenizer: _Path | None = None,
    column: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> RouteReport:
    """Choose each task's experts and write a small checkpoint per task.

    `out`/TASK holds a checkpoint with the task's experts, `out`/task_routing.json the same choice for the full
    checkpoint at run time (import moetools.hf). Every task is tested on the held-out text of every other.

    Args:
        model: Folder of the checkpoint (Hugging Face layout, safetensors).
        out: Folder to write; must not exist.
        keep: Experts of a task in every layer.
        top_p: Instead of `keep`: as many experts as it takes to keep this part of a task's score in every layer.
        score: What makes an expert worth keeping for a task: easy-ep, frequency, gate, output, reap, token.
        union: One more checkpoint for several tasks, or all; may be repeated.
        refit: joint: solve the down projections anew on the task's text; none: leave them. joint if not given, where
            every task has enough text for it.
        tune_router: Train the tasks' routers towards the full model; both models must fit in memory.
        test: Held-out text of every task; if not given, the last fifth of each task's text is held out. A path,
            several, or a mapping of names to paths.
        level: Also measure the full model with experts chosen per sentence or per sequence; may be repeated.
        pool: How a unit's scores are pooled: mean-logits, mean-probs, seq-topk; all three if not given.
        classifier: How a prompt's task is found: ngrams (of token ids), router (probabilities over the prefix), none.
        prefix: Tokens of the prompt that count.
        threshold: Prompts that are less sure of their task than this use all experts.
        mtp: Multi-token-prediction layers. follow: their experts are reduced like any layer's; drop: they are left out;
            keep: as they are, if that loads. follow if not given, drop where that cannot be.
        output_format: Weights of a packed input. same: every kept tensor byte for byte as it lies there; bf16: decoded.
            same if not given, where the command changes no packed weight.
        report: Write report.html with the plots.
        plots: Also write every picture of report.html as SVG and PNG into a folder that is new or empty.
        data: Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a
            .safetensors file. Repeat it for several tasks; the name may be left out. A path, several, or a mapping of
            names to paths.
        seq_len: Tokens per sequence.
        samples: Sequences per task, or all; 512 sequences of 512 tokens, shared evenly among the tasks, if not given.
        batch_size: Sequences per batch; about 2,048 tokens if not given.
        pack: Join documents and cut windows of `seq_len` tokens, or pad one sequence per document.
        shuffle: Draw documents in seeded random order instead of file order.
        seed: Seed of everything that is drawn at random.
        tokenizer: Folder of the tokenizer; the model's own if not given.
        column: Key or column that holds the text or the messages, where a record has several or calls it otherwise.
        strict: Refuse the first record that cannot be used, instead of leaving it out.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        overwrite: Replace `out` if it is a checkpoint, and throw away what an interrupted run left.
        resume: Go on from the last finished layer of an interrupted run.
        dry_run: Check everything and show sizes, memory and time; write nothing. The time is told from the first
            layers, made on a little of the text.
        verify: Reload `out` with stock transformers and compare it with what was meant.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def place_experts(
    model: _Path,
    out: _Path,
    *,
    devices: int | None = None,
    stats: _Path | None = None,
    output_format: str | None = None,
    data: _Texts = [],
    seq_len: int = 512,
    samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    tokenizer: _Path | None = None,
    column: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> PlaceReport:
    """Write the checkpoint with its experts in an order that loads several devices evenly.

    For engines that give every device consecutive experts. The router's rows move along: the output computes the same.
    inspect-routing with `devices` plans without writing, and with replicas.

    Args:
        model: Folder of the checkpoint (Hugging Face layout, safetensors).
        out: Folder to write; must not exist.
        devices: Devices that share the experts of every layer, each holding equally many consecutive ones.
        stats: Take statistics that inspect-routing saved instead of measuring them.
        output_format: Weights of a packed input. same: every kept tensor byte for byte as it lies there; bf16: decoded.
            same if not given, where the command changes no packed weight.
        data: Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a
            .safetensors file. Repeat it for several tasks; the name may be left out. A path, several, or a mapping of
            names to paths.
        seq_len: Tokens per sequence.
        samples: Sequences per task, or all; 512 sequences of 512 tokens, shared evenly among the tasks, if not given.
        batch_size: Sequences per batch; about 2,048 tokens if not given.
        pack: Join documents and cut windows of `seq_len` tokens, or pad one sequence per document.
        shuffle: Draw documents in seeded random order instead of file order.
        seed: Seed of everything that is drawn at random.
        tokenizer: Folder of the tokenizer; the model's own if not given.
        column: Key or column that holds the text or the messages, where a record has several or calls it otherwise.
        strict: Refuse the first record that cannot be used, instead of leaving it out.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        overwrite: Replace `out` if it is a checkpoint, and throw away what an interrupted run left.
        resume: Go on from the last finished layer of an interrupted run.
        dry_run: Check everything and show sizes, memory and time; write nothing. The time is told from the first
            layers, made on a little of the text.
        verify: Reload `out` with stock transformers and compare it with what was meant.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def quantize(
    model: _Path,
    out: _Path,
    *,
    scheme: str = "w4a16",
    method: str = "gptq",
    group_size: int | None = None,
    bits: float | None = None,
    experts_only: bool = False,
    attention: str | None = None,
    embeddings: str | None = None,
    asymmetric: bool = False,
    format: str = "auto",
    target: str = "transformers",
    imatrix: _Path | None = None,
    reference: _Path | None = None,
    expand: bool = False,
    data: _Texts = [],
    seq_len: int = 512,
    samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    tokenizer: _Path | None = None,
    column: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> QuantizationReport:
    """Write a checkpoint whose weights take fewer bits: from int8 down to below one bit per weight.

    Routers and norms stay as they are; embeddings and the head do unless `embeddings` is given. `expand` turns a
    quantized checkpoint into a plain one.

    Args:
        model: Folder of the checkpoint (Hugging Face layout, safetensors).
        out: Folder to write; must not exist.
        scheme: One of w8a16, w6a16, w5a16, w4a16, w3a16, w2a16, ternary, fp8, fp8-block, mxfp4, nvfp4, w8a8, q6_k,
            q5_k, q4_k, q3_k, q2_k, mixed, sub1.
        method: One of awq, gptq, hqq, rtn.
        group_size: Columns that share a scale; 0: one per row. [default: largest of 128, 64, 32, 16 that divides all
            rows]
        bits: Average bits per routed-expert weight, of codes (mixed, 2.5) or of all that is stored (sub1, 0.9).
        experts_only: Quantize the routed experts and nothing else.
        attention: Scheme of the attention, sub1:BITS, or none. [default: `scheme`; w4a16 with ternary, mixed and sub1]
        embeddings: Scheme of embeddings and head, or sub1:BITS; for the formats moetools, gguf and mlx. [default: none]
        asymmetric: Integers with a zero point.
        format: auto, compressed-tensors, moetools (any mix), gguf (also write `out`/model.gguf), or mlx (also
            `out`/mlx).
        target: What must load the result: transformers, vllm or both.
        imatrix: With `format=gguf`: also write the importance matrix of the model on `data`, for llama.cpp's llama-
            quantize.
        reference: The model that `model` was made of, or `model` itself: the experts' down projections are solved anew
            behind the rounded gates and ups for its hidden states, then rounded.
        expand: Write the plain checkpoint that a quantized `model` stands for.
        data: Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a
            .safetensors file. Repeat it for several tasks; the name may be left out. A path, several, or a mapping of
            names to paths.
        seq_len: Tokens per sequence.
        samples: Sequences per task, or all; 512 sequences of 512 tokens, shared evenly among the tasks, if not given.
        batch_size: Sequences per batch; about 2,048 tokens if not given.
        pack: Join documents and cut windows of `seq_len` tokens, or pad one sequence per document.
        shuffle: Draw documents in seeded random order instead of file order.
        seed: Seed of everything that is drawn at random.
        tokenizer: Folder of the tokenizer; the model's own if not given.
        column: Key or column that holds the text or the messages, where a record has several or calls it otherwise.
        strict: Refuse the first record that cannot be used, instead of leaving it out.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        overwrite: Replace `out` if it is a checkpoint, and throw away what an interrupted run left.
        resume: Go on from the last finished layer of an interrupted run.
        dry_run: Check everything and show sizes, memory and time; write nothing. The time is told from the first
            layers, made on a little of the text.
        verify: Reload `out` with stock transformers and compare it with what was meant.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def distill(
    teacher: _Path,
    out: _Path,
    *,
    init: str = "neurons",
    width: int | None = None,
    layers: int | None = None,
    scaling: str = "uniform",
    warm_start: bool = True,
    local_steps: int | None = None,
    calibration: _Texts = [],
    student: _Path | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    max_minutes: float | None = None,
    train: str = "all",
    train_batch_size: int = 8,
    accumulate: int = 1,
    learning_rate: float = 0.001,
    relative_rate: bool = False,
    weight_decay: float = 0.0,
    alpha: float = 0.0,
    temperature: float = 1.0,
    divergence: str = "forward",
    hidden_weight: float = 0.0,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    fsdp: bool = False,
    log_every: int = 10,
    save_every: int = 0,
    tensorboard: _Path | None = None,
    train_baseline: str | None = None,
    teacher_cache: _Path | None = None,
    cache_top: int = 64,
    data: _Texts = [],
    seq_len: int = 512,
    samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    tokenizer: _Path | None = None,
    column: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> DistillReport | None:
    """Make a dense student of a Mixture-of-Experts model, or train a student towards its teacher.

    Every FFN is fitted to its MoE block in closed form and by local steps; `steps`, `epochs` or `max_minutes` train the
    whole student afterwards. `student` heals an existing checkpoint.

    Args:
        teacher: Folder of the Mixture-of-Experts checkpoint.
        out: Folder to write; must not exist.
        init: How each FFN starts: one of acp, aligned-average, cp, do-acp, frequency-average, mean, merge-concatenate,
            neurons, random, random-neurons, saliency-average, svd-kg, top-kg.
        width: Neurons of every FFN; as many as a token uses in the teacher.
        layers: Decoder layers, evenly spaced; all if not given.
        scaling: Experts' neurons are scaled by the mean routing weight (uniform) or each expert's own (marginal).
        warm_start: Fit every FFN to what its MoE block did, in closed form and layer after layer.
        local_steps: Gradient steps of the warm start on each FFN alone; 0 for none, 300 if not given.
        calibration: Text to fit the layers on, in place of the first 64 sequences of every task (all of them if nothing
            is trained). A path, several, or a mapping of names to paths.
        student: Train this checkpoint instead of making a student: healing.
        steps: Optimizer steps.
        epochs: Passes over the text.
        max_minutes: Wall time of the training; the learning rate falls to zero in it.
        train: all; or of a Mixture-of-Experts student router, or experts (routers and experts).
        train_batch_size: Sequences per process and forward pass.
        accumulate: Forward passes per optimizer step.
        learning_rate: Of AdamW.
        relative_rate: The learning rate counts in root mean squares of each tensor.
        weight_decay: Of AdamW, for matrices.
        alpha: Loss: A * cross-entropy + (1 - A) * divergence from the teacher.
        temperature: Of the divergence.
        divergence: forward KL, reverse KL or jsd.
        hidden_weight: Weight of the distance of hidden states.
        bf16: Compute in bfloat16; weights and optimizer stay float32.
        gradient_checkpointing: Recompute activations instead of keeping them.
        fsdp: Shard the student over all processes (FSDP2); use torchrun.
        log_every: Steps between lines of `out`/metrics.jsonl.
        save_every: Steps between checkpoints that `resume` goes on from; 0 for none.
        tensorboard: Also write event files there (extra: tensorboard).
        train_baseline: Also train without the teacher for the same steps, from random weights (scratch) or the same
            student (student), and report the share of the sparse gain kept.
        teacher_cache: Capture the teacher's most likely tokens there, layer by layer, and train on them: the teacher
            never has to fit in memory.
        cache_top: Tokens per position in the cache.
        data: Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a
            .safetensors file. Repeat it for several tasks; the name may be left out. A path, several, or a mapping of
            names to paths.
        seq_len: Tokens per sequence.
        samples: Sequences per task, or all; 512 sequences of 512 tokens, shared evenly among the tasks, if not given.
        batch_size: Sequences per batch; about 2,048 tokens if not given.
        pack: Join documents and cut windows of `seq_len` tokens, or pad one sequence per document.
        shuffle: Draw documents in seeded random order instead of file order.
        seed: Seed of everything that is drawn at random.
        tokenizer: Folder of the tokenizer; the model's own if not given.
        column: Key or column that holds the text or the messages, where a record has several or calls it otherwise.
        strict: Refuse the first record that cannot be used, instead of leaving it out.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        overwrite: Replace `out` if it is a checkpoint, and throw away what an interrupted run left.
        resume: Go on from the last finished layer of an interrupted run.
        dry_run: Check everything and show sizes, memory and time; write nothing. The time is told from the first
            layers, made on a little of the text.
        verify: Reload `out` with stock transformers and compare it with what was meant.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def evaluate(
    models: _Path | Sequence[_Path],
    *,
    reference: _Path | None = None,
    html: _Path | None = None,
    choices: _Texts = [],
    generate: int | None = None,
    prompts: int = 32,
    prompt_tokens: int = 32,
    sampled: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    structured: int | None = None,
    harness: str | Sequence[str] = [],
    fewshot: int | None = None,
    limit: int | None = None,
    gate: str | Sequence[str] = [],
    data: _Texts = [],
    seq_len: int = 512,
    samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    tokenizer: _Path | None = None,
    column: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Measure models side by side: perplexity per task, exact KL to the original, agreement, size, speed.

    Args:
        models: Folders of one or more checkpoints, compared in one table.
        reference: The original, for KL divergence and agreement.
        html: Also write the result as one self-contained page; a file that is there is replaced.
        choices: Multiple-choice items (.jsonl). Repeat it for several tasks. A path, several, or a mapping of names to
            paths.
        generate: Also continue the beginnings of texts by so many tokens, greedily, and count continuations that loop
            or leave the reference's.
        prompts: Beginnings of each task that `generate` continues.
        prompt_tokens: Length of such a beginning, in tokens.
        sampled: Also draw so many continuations of each beginning, with `seed`, the same noise for every model.
        temperature: Divides the logits that `sampled` draws from.
        top_p: Share of the probability that `sampled` draws from, the likeliest tokens.
        structured: Also answer so many chats of each task that name tools or a JSON schema, in `generate` tokens at
            most, and count valid answers.
        harness: Task of EleutherAI's evaluation harness (lm-eval), by its name or as a .yaml file. Repeat it for
            several.
        fewshot: Examples in front of every question of `harness`.
        limit: Questions of each task of `harness`; all if not given.
        gate: Exit with 3 if a model misses this bound, such as 'kl<=0.05'. Repeat it for several bounds.
        data: Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a
            .safetensors file. Repeat it for several tasks; the name may be left out. A path, several, or a mapping of
            names to paths.
        seq_len: Tokens per sequence.
        samples: Sequences per task, or all; 512 sequences of 512 tokens, shared evenly among the tasks, if not given.
        batch_size: Sequences per batch; about 2,048 tokens if not given.
        pack: Join documents and cut windows of `seq_len` tokens, or pad one sequence per document.
        shuffle: Draw documents in seeded random order instead of file order.
        seed: Seed of everything that is drawn at random.
        tokenizer: Folder of the tokenizer; the model's own if not given.
        column: Key or column that holds the text or the messages, where a record has several or calls it otherwise.
        strict: Refuse the first record that cannot be used, instead of leaving it out.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def compare(
    models: _Path | Sequence[_Path],
    *,
    reference: _Path | None = None,
    html: _Path | None = None,
    plots: _Path | None = None,
    data: _Texts = [],
    seq_len: int = 512,
    samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    tokenizer: _Path | None = None,
    column: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Comparison:
    """Show checkpoints side by side: size, experts, bits, loss, and which of them no other one beats.

    Without text, sizes alone. `html` writes the comparison as a page.

    Args:
        models: Folders of one or more checkpoints.
        reference: The original: every model's KL divergence from it is measured.
        html: Also write the comparison as one self-contained page; a file that is there is replaced.
        plots: Also write every picture of the page as SVG and PNG into a folder that is new or empty.
        data: Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a
            .safetensors file. Repeat it for several tasks; the name may be left out. A path, several, or a mapping of
            names to paths.
        seq_len: Tokens per sequence.
        samples: Sequences per task, or all; 512 sequences of 512 tokens, shared evenly among the tasks, if not given.
        batch_size: Sequences per batch; about 2,048 tokens if not given.
        pack: Join documents and cut windows of `seq_len` tokens, or pad one sequence per document.
        shuffle: Draw documents in seeded random order instead of file order.
        seed: Seed of everything that is drawn at random.
        tokenizer: Folder of the tokenizer; the model's own if not given.
        column: Key or column that holds the text or the messages, where a record has several or calls it otherwise.
        strict: Refuse the first record that cannot be used, instead of leaving it out.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def serve_check(
    model: _Path,
    *,
    engine: str | Sequence[str] = [],
    prompt: str = "In 1998 seven of them were there, and each one knew another trade: def add(a, b): return a + b",
    tolerance: float = 0.1,
    timeout: int = 600,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> ServeReport:
    """Try a checkpoint in the engines of this machine: who loads it, and who computes the same.

    transformers, vLLM, SGLang, llama.cpp (a .gguf file in the folder) and mlx-lm, each in a process of its own, score
    one prompt; so does moetools. Exit code 3 if one differs.

    Args:
        model: Folder of the checkpoint (Hugging Face layout, safetensors).
        engine: Engine that must serve it: transformers, moetools.hf, vllm, sglang, llama.cpp, mlx; with =PYTHON if it
            lives in an environment of its own. Repeat it for several; all that this Python has if not given.
        prompt: Text whose tokens are scored.
        tolerance: Largest mean difference of the tokens' log-probabilities, as a share of their standard deviation.
        timeout: Seconds an engine may take.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def compress(
    model: _Path,
    out: _Path,
    *,
    target_size: str | None = None,
    context: int | None = None,
    batch: int = 1,
    target: str = "transformers",
    min_experts: int = 1,
    checks: int = 3,
    heal_minutes: float | None = None,
    html: _Path | None = None,
    plots: _Path | None = None,
    plan_only: bool = False,
    test: _Texts = [],
    keep_tasks: str | Sequence[str] = [],
    probe_tokens: int | None = None,
    data: _Texts = [],
    seq_len: int = 512,
    samples: int | Literal["all"] | None = None,
    batch_size: int | None = None,
    pack: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    tokenizer: _Path | None = None,
    column: str | None = None,
    strict: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> CompressReport:
    """Write the best mix of fewer experts and fewer bits that fits into a number of bytes.

    Plans are predicted from measurements of single choices on little text, and the most promising one is built. The
    weight files never take more than `target_size`.

    Args:
        model: Folder of the checkpoint (Hugging Face layout, safetensors).
        out: Folder to write; must not exist.
        target_size: Bytes that the weight files may take, such as 24GB, or a share of the original, such as 40%.
        context: Tokens per sequence whose keys and values (16 bits) must fit beside the weights: they are taken off
            `target_size`.
        batch: Sequences at once, for `context`.
        target: What must load the result: transformers, vllm, or packed (transformers with moetools.hf imported; any
            mix).
        min_experts: Experts that every layer keeps at least.
        checks: Plans that are built on all of the text and measured on held-out text before the best of them is taken.
        heal_minutes: Then train the best plan for so long towards the original's predictions, and take what loses less;
            both models must fit in memory.
        html: Also write the plans as one self-contained page, size against loss; a file that is there is replaced.
        plots: Also write every picture of the page as SVG and PNG into a folder that is new or empty.
        plan_only: Predict, show the frontier and write the plan to `out`-plan.yaml, a recipe for run; build nothing.
        test: Held-out text that plans are judged on; if not given, the last fifth of each task's text is held out. A
            path, several, or a mapping of names to paths.
        keep_tasks: A task of `data` whose loss counts: plans are calibrated, chosen and healed on such text alone.
            Repeat it; all tasks count if none is given.
        probe_tokens: Tokens of calibration text, and of held-out text, that choices are tried out on. [default: as many
            as take three passes over the calibration text, at most 16,384]
        data: Text: a .txt, .jsonl or .parquet file, a folder of them, hf:DATASET:CONFIG:SPLIT, or token ids in a
            .safetensors file. Repeat it for several tasks; the name may be left out. A path, several, or a mapping of
            names to paths.
        seq_len: Tokens per sequence.
        samples: Sequences per task, or all; 512 sequences of 512 tokens, shared evenly among the tasks, if not given.
        batch_size: Sequences per batch; about 2,048 tokens if not given.
        pack: Join documents and cut windows of `seq_len` tokens, or pad one sequence per document.
        shuffle: Draw documents in seeded random order instead of file order.
        seed: Seed of everything that is drawn at random.
        tokenizer: Folder of the tokenizer; the model's own if not given.
        column: Key or column that holds the text or the messages, where a record has several or calls it otherwise.
        strict: Refuse the first record that cannot be used, instead of leaving it out.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        overwrite: Replace `out` if it is a checkpoint, and throw away what an interrupted run left.
        resume: Go on from the last finished layer of an interrupted run.
        dry_run: Check everything and show sizes, memory and time; write nothing. The time is told from the first
            layers, made on a little of the text.
        verify: Reload `out` with stock transformers and compare it with what was meant.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def run(
    recipe: _Path,
    *,
    set: str | Sequence[str] = [],
    dry_run: bool = False,
    progress: bool = False,
) -> RunReport:
    """Carry out a recipe: a chain of the other commands, checked as a whole before it begins.

    A YAML file, or the name of a recipe that comes with moetools. Steps that are finished are not done again unless
    their settings or inputs have changed.

    Args:
        recipe: File of the recipe, or name of one that comes with moetools.
        set: Give a variable of the recipe its value. Repeat it for several variables; a variable that is given several
            times is a list.
        dry_run: Check the whole chain and show what every step would do, with sizes, memory and time; write nothing.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """

def run_demo(
    dir: _Path,
    *,
    quick: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory_budget: int | str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> DemoReport:
    """Try everything on the small MoE model that comes with the package, offline.

    Puts the model and its data into `dir`, prunes and merges it to half of its experts, and compares all three.

    Args:
        dir: Folder for the model, its data and the results.
        quick: Use less text; the numbers are rougher.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        dtype: Compute dtype: auto, float32, bfloat16, float16. auto is float32 on a CPU and bfloat16 on a GPU.
        memory_budget: Bound for weights and activations on the computing device, such as 8GiB or 500MB; four fifths of
            the free memory if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        progress: Show a progress bar on stderr.

    Raises:
        MoetoolsError: what cannot be done, in one sentence, with a hint; its class tells the kind.
    """
