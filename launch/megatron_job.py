"""What the Megatron programs share: ranks and model settings, indexed datasets, the loop over DeepSpeed's engine."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from tqdm import tqdm

import ds_shampoo
from clock import StepClock
from ds_shampoo.megatron import mpu
from ds_shampoo.testing import megatron_on_cpu as cpu
from leftovers import loading_ops
from megatron_arguments import parse_arguments
from recorder import Recorder
from tokenization import MegatronTokenizer

Batch = Mapping[str, Tensor]

# The vocabulary is padded to a multiple of this, and where that can be, to the same one at any tensor-parallel size.
_VOCABULARY_UNIT = 128


@dataclass(frozen=True)
class Pipeline:
    """How a kind of model runs over pipeline stages.

    Attributes:
        model: builds this rank's stage from what `Task.model` is given.
        stage_inputs: what the first stage takes of a batch, and what the last one takes the loss with.
    """

    model: Callable[[argparse.Namespace, TransformerConfig, int], nn.Module]
    stage_inputs: Callable[[Batch], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Task:
    """What distinguishes one kind of model from another.

    Attributes:
        name: what the program is called.
        dataset: Megatron's class of it.
        dataset_config: its settings, from those that all datasets share.
        model: builds the model from the command line, Megatron's settings and the padded size of the vocabulary.
        losses: the engine's losses on a batch, and the weight of each.
        pipeline: how it runs over pipeline stages; None where it does not.
    """

    name: str
    dataset: type
    dataset_config: Callable[[argparse.Namespace, dict[str, Any]], Any]
    model: Callable[[argparse.Namespace, TransformerConfig, int], nn.Module]
    losses: Callable[[Any, Batch], tuple[Tensor, Tensor]]
    pipeline: Pipeline | None = None


def main(task: Task, description: str) -> None:
    """Trains until `--train-iters`, from the newest checkpoint in `--save` on."""
    arguments = parse_arguments(description)
    cpu.stand_in()
    try:
        with loading_ops():
            deepspeed.init_distributed()
            dist.barrier()  # from here on every rank has mapped the others' buffers, and any may end
            engine, tokenizer = build(task, arguments)
        train, validation = datasets(task, arguments, engine, tokenizer)
    except (OSError, ValueError) as error:
        sys.exit(f"{task.name}: error: {error}")
    if arguments.save and (arguments.save / "latest").exists():
        engine.load_checkpoint(str(arguments.save))
    loop = PipelineLoop if arguments.pipeline_model_parallel_size > 1 else Loop
    loop(task, arguments, engine, train, validation).run()


def build(task: Task, arguments: argparse.Namespace) -> tuple[Any, MegatronTokenizer]:
    """The engine around a new model, and the tokenizer that its vocabulary is of."""
    slices, stages = arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size
    if stages > 1 and task.pipeline is None:
        raise ValueError(f"--pipeline-model-parallel-size {stages}: {task.name} runs in one stage only")
    if dist.get_world_size() % (slices * stages):
        times = f" times --pipeline-model-parallel-size {stages}" if stages > 1 else ""
        raise ValueError(f"--tensor-model-parallel-size {slices}{times} must divide the {dist.get_world_size()} ranks")
    tokenizer = MegatronTokenizer(arguments.tokenizer_model)
    parallel_state.initialize_model_parallel(slices, stages)
    torch.manual_seed(arguments.seed)
    model_parallel_cuda_manual_seed(arguments.seed)
    unit = math.lcm(_VOCABULARY_UNIT, slices)
    vocabulary = math.ceil(tokenizer.vocab_size / unit) * unit
    staged = task.pipeline if stages > 1 else None
    model = (staged or task).model(arguments, settings_of(arguments), vocabulary)
    engine, *_ = ds_shampoo.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=str(arguments.deepspeed_config),
        mpu=None if staged else mpu,  # a pipeline brings its own
    )
    return engine, tokenizer


def settings_of(arguments: argparse.Namespace) -> TransformerConfig:
    """Megatron's settings; its fused CUDA kernels are left out where there is no CUDA."""
    cuda = get_accelerator().device_name() == "cuda"
    return TransformerConfig(
        num_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        ffn_hidden_size=arguments.ffn_hidden_size or 4 * arguments.hidden_size,
        num_attention_heads=arguments.num_attention_heads,
        num_query_groups=arguments.num_query_groups or arguments.num_attention_heads,
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        sequence_parallel=arguments.sequence_parallel,
        add_bias_linear=not arguments.disable_bias_linear,
        gated_linear_unit=arguments.swiglu,
        activation_func=nn.functional.silu if arguments.swiglu else nn.functional.gelu,
        normalization=arguments.normalization,
        recompute_granularity="selective" if arguments.recompute_activations else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not cuda,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=cuda,
        bias_dropout_fusion=cuda,
        masked_softmax_fusion=cuda,
    )


def datasets(
    task: Task, arguments: argparse.Namespace, engine: Any, tokenizer: MegatronTokenizer
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Training and validation samples, built by rank 0 and read by all from a cache beside the data.

    Raises:
        ValueError: where a part of the split is empty.
    """
    size = engine.train_batch_size()
    common = {
        "random_seed": arguments.seed,
        "sequence_length": arguments.seq_length,
        "blend": ([str(arguments.data_path)], None),
        "split": arguments.split,
        "path_to_cache": str(arguments.data_path.parent / "cache"),
        "tokenizer": tokenizer,
    }
    config = task.dataset_config(arguments, common)
    documents = len(IndexedDataset(str(arguments.data_path)).document_indices) - 1
    for part, span in zip(("train on", "validate on"), config.split_matrix, strict=False):
        if span is None or round(span[0] * documents) == round(span[1] * documents):  # Megatron would look for ever
            raise ValueError(f"--split {arguments.split} of {documents} documents leaves none to {part}")
    sizes = [arguments.train_iters * size, arguments.eval_iters * size, 0]
    train, validation, _ = BlendedMegatronDatasetBuilder(task.dataset, sizes, lambda: True, config).build()
    return train, validation


class Loop:
    """One rank's part in the training loop."""

    def __init__(
        self, task: Task, arguments: argparse.Namespace, engine: Any, train: Sequence[Any], validation: Sequence[Any]
    ) -> None:
        self.task, self.arguments, self.engine = task, arguments, engine
        self.train, self.validation = train, validation
        self.rank = parallel_state.get_data_parallel_rank()
        self.ranks = parallel_state.get_data_parallel_world_size()

    def run(self) -> None:
        arguments, first, chief = self.arguments, self.engine.global_steps, dist.get_rank() == 0
        folder: Path | None = arguments.save
        if chief and folder:
            folder.mkdir(parents=True, exist_ok=True)
        recorder = Recorder(folder, first) if chief and folder else None
        clock = StepClock()
        with tqdm(total=arguments.train_iters, initial=first, disable=not chief, unit="step") as bar:
            for step in range(first + 1, arguments.train_iters + 1):
                clock.start()
                record: dict[str, Any] = {"step": step, "loss": self._step(step - 1)}
                spent = clock.spent()
                if not math.isfinite(record["loss"]):
                    sys.exit(f"{self.task.name}: error: the loss is {record['loss']} at step {step}")
                if step % arguments.eval_interval == 0 or step == arguments.train_iters:
                    record["val_loss"] = self._evaluate()
                if recorder:
                    metrics = getattr(self.engine.basic_optimizer, "metrics", dict)
                    recorder.write(record | metrics(), spent)
                bar.set_postfix({name: f"{record[name]:.4f}" for name in ("loss", "val_loss") if name in record})
                bar.update()
                if folder and (step % arguments.save_interval == 0 or step == arguments.train_iters):
                    self.engine.save_checkpoint(str(folder))
        if chief and first < arguments.train_iters:
            print(f"validation loss {record['val_loss']:.4f} after {step} steps", flush=True)

    def _step(self, step: int) -> float:
        """Forward, backward and update of one step; its mean loss over everything that it counts."""
        engine, sums = self.engine, torch.zeros(2, device=self.engine.device)
        parts = engine.gradient_accumulation_steps()
        for part in range(parts):
            losses, weights = self.task.losses(engine, self._batch(self.train, step * parts + part))
            engine.backward((losses * weights).sum() / weights.sum())
            engine.step()
            sums += torch.stack(((losses * weights).sum(), weights.sum())).detach()
        return self._mean(sums)

    @torch.no_grad()
    def _evaluate(self) -> float:
        self.engine.eval()
        sums = torch.zeros(2, device=self.engine.device)
        for number in range(self.arguments.eval_iters):
            losses, weights = self.task.losses(self.engine, self._batch(self.validation, number))
            sums += torch.stack(((losses * weights).sum(), weights.sum()))
        self.engine.train()
        return self._mean(sums)

    def _mean(self, sums: Tensor) -> float:
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        return float(sums[0] / sums[1])

    def _batch(self, samples: Sequence[Any], number: int) -> Batch:
        """This data-parallel rank's part of a micro-batch; the same on all of its tensor-parallel ranks."""
        size = self.engine.train_micro_batch_size_per_gpu()
        first = (number * self.ranks + self.rank) * size
        chosen = [samples[at % len(samples)] for at in range(first, first + size)]
        return {
            key: torch.stack([torch.as_tensor(sample[key]) for sample in chosen]).to(self.engine.device)
            for key in chosen[0]
        }


class PipelineLoop(Loop):
    """The same over pipeline stages: the engine has the micro-batches of a step go through them."""

    def _step(self, step: int) -> float:
        parts = self.engine.gradient_accumulation_steps()
        return float(self.engine.train_batch(self._inputs(self.train, step * parts, parts)))

    def _evaluate(self) -> float:
        parts = self.arguments.eval_iters
        return float(self.engine.eval_batch(self._inputs(self.validation, 0, parts), num_micro_batches=parts))

    def _inputs(self, samples: Sequence[Any], first: int, count: int) -> Iterator[Any]:
        assert self.task.pipeline is not None
        for number in range(first, first + count):
            yield self.task.pipeline.stage_inputs(self._batch(samples, number))
