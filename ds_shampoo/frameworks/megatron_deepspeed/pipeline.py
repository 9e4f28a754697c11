"""A Megatron-core GPT cut into the layers of DeepSpeed's pipeline engine, with tensor parallelism inside the stages."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from ds_shampoo.config import SettingsError
from ds_shampoo.frameworks.deepspeed.internals import count_on_every_rank, is_counted_elsewhere
from ds_shampoo.frameworks.megatron import internals
from ds_shampoo.frameworks.megatron.internals import MEGATRON
from ds_shampoo.frameworks.megatron_deepspeed import mpu
from ds_shampoo.frameworks.protocols import NamesWholeModel
from ds_shampoo.parameters import marks
from ds_shampoo.sharding.gathering import gathered

_POSITIONS = ("learned_absolute", "rope", "none")
_TIED = "embedding"


class GPTPipeline(PipelineModule):  # type: ignore[misc]
    """Megatron's GPTModel for `ds_shampoo.initialize`, which makes a pipeline engine of it; no `mpu` is passed then.

    `parallel_state` says how many stages there are, and over how many ranks each is sliced. Every stage builds its own
    layers only. A micro-batch is `((tokens, position_ids), (labels, loss_mask))`, each [batch, sequence], the first
    three int64 and the mask a number: the loss is the mean over what the mask counts. Attention is causal.

    Parameters have the names that they have in a GPTModel, as far as Shampoo and its checkpoints are concerned.
    """

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: ModuleSpec | TransformerBlockSubmodules,
        vocab_size: int,
        max_sequence_length: int,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: str = "learned_absolute",
        rotary_percent: float = 1.0,
        rotary_base: int = 10000,
        seed: int = 1234,
    ) -> None:
        """Takes what GPTModel takes.

        Args:
            position_embedding_type: "learned_absolute", "rope" or "none".
            seed: layer n, the embedding being 0, is initialised from `seed + n`, on whatever stage. As with any
                PipelineModule that seeds its layers, the random state is another one afterwards.

        Raises:
            SettingsError: for a setting of Megatron's that is not supported here, a number of layers that the stages
                do not divide, or ranks in another order than that of DeepSpeed's pipelines.
        """
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        _refuse_unsupported(config, stages, position_embedding_type)
        topology = _topology()
        config = copy.copy(config)
        config.pipeline_model_parallel_size = 1  # DeepSpeed divides the layers: each is told its number over all
        block = internals.layers_of(config, transformer_layer_spec)
        embedding = (config, vocab_size, max_sequence_length)
        rotary = None
        if position_embedding_type == "rope":
            rotary = RotaryEmbedding(
                config.kv_channels,
                rotary_percent,
                config.rotary_interleaved,
                rotary_base=rotary_base,
                use_cpu_initialization=config.use_cpu_initialization,
            )
        layers: dict[str, LayerSpec] = {
            "embedding": LayerSpec(Embedding, *embedding, position_embedding_type),
            **{
                f"decoder.layers.{number}": LayerSpec(DecoderLayer, config, spec, number, rotary)
                for number, spec in enumerate(block.layer_specs)
            },
            **({"decoder.final_layernorm": LayerSpec(FinalNorm, config, block.layer_norm)} if block.layer_norm else {}),
            "output_layer": LayerSpec(OutputLayer, config, vocab_size),
        }
        if share_embeddings_and_output_weights:
            weight = {"tied_weight_attr": ["word_embeddings.weight"], "tied": True}
            layers["embedding"] = TiedLayerSpec(_TIED, Embedding, *embedding, position_embedding_type, **weight)
            layers["output_layer"] = TiedLayerSpec(  # its copy has no use for position embeddings
                _TIED, Embedding, *embedding, "none", forward_fn=Embedding.logits, **weight
            )
        super().__init__(
            list(layers.values()),
            topology=topology,
            loss_fn=masked_loss,
            seed_layers=True,
            seed_fn=_seed,
            base_seed=seed,
            partition_method=f"type:{DecoderLayer.__name__}",
            activation_checkpoint_func=_checkpoint,
            checkpointable_layers=[DecoderLayer.__name__],
        )
        self._names = list(layers)
        self.sequence_parallel = bool(config.sequence_parallel)
        self.seed_layers = False  # or every forward pass would begin with a new seed
        self._ranks = Ranks(super().mpu())
        self._count_once()

    def mpu(self) -> Ranks:
        return self._ranks

    def whole_model_name(self, name: str) -> str:
        """The name in a GPTModel of what is called `name` on this stage."""
        if name.startswith("tied_modules."):
            return name.removeprefix("tied_modules.")
        number, _, rest = name.partition(".")
        return f"{self._names[int(number)]}.{rest.removeprefix('inner.')}"

    def complete_settings(self, settings: dict[str, Any]) -> None:
        """Sets in a DeepSpeed config what this model needs; `ds_shampoo.initialize` asks for it.

        DeepSpeed would have each tensor-parallel rank send its share of an activation that all of them hold; under
        sequence parallelism each holds another part.

        Raises:
            SettingsError: if the config says otherwise.
        """
        if not self.sequence_parallel:
            return
        section = settings.setdefault("pipeline", {})
        for key in ("pipe_partitioned", "grad_partitioned"):
            if section.setdefault(key, False):
                raise SettingsError(f"pipeline.{key} = true: not with sequence parallelism of Megatron; leave it out")

    def _count_once(self) -> None:
        """Has DeepSpeed count every parameter once in the norm that it clips by.

        At stage 0 it takes what is marked as model-parallel, and of the rest what the first rank of all stages holds.
        """
        first_slice = self._ranks.get_slice_parallel_rank() == 0
        for parameter in self.parameters():
            if is_counted_elsewhere(parameter):
                internals.unmark_slice(parameter)
            elif first_slice:
                count_on_every_rank(parameter)


class Ranks:
    """DeepSpeed's grid as the `mpu` of its engine, with the duties of `ds_shampoo.megatron.mpu`."""

    shampoo_sections = staticmethod(mpu.shampoo_sections)
    shampoo_prepare = staticmethod(mpu.shampoo_prepare)

    def __init__(self, grid: Any) -> None:
        self._inner = grid

    def shampoo_name(self, model: NamesWholeModel, name: str) -> str:
        """A parameter's name among those of all stages."""
        return model.whole_model_name(name)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self._inner, name)


class Embedding(LanguageModelEmbedding):  # type: ignore[misc]
    """Words and their places; under sequence parallelism, this rank's part of the sequence."""

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        position_embedding_type: str,
        tied: bool = False,
    ) -> None:
        super().__init__(config, vocab_size, max_sequence_length, position_embedding_type)
        marks.mark_embedding_or_head(self.word_embeddings.weight)
        self.head = OutputLayer(config, vocab_size, skip_weight_param_allocation=True) if tied else None

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """[batch, sequence] tokens and places to [sequence, batch, hidden]."""
        tokens, places = inputs
        return super().forward(tokens, places)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[sequence, batch, hidden] to this rank's slice of [sequence, batch, vocabulary]."""
        assert self.head is not None
        return self.head(hidden, self.word_embeddings.weight)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """One TransformerLayer, [sequence, batch, hidden] to the same."""

    def __init__(
        self, config: TransformerConfig, spec: ModuleSpec, number: int, rotary: RotaryEmbedding | None
    ) -> None:
        super().__init__()
        self.inner = build_module(spec, config=config, layer_number=number + 1)
        self._rotary = rotary
        self._slices = parallel_state.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1

    def forward(self, hidden: Tensor) -> Tensor:
        rotary = None if self._rotary is None else self._rotary(hidden.shape[0] * self._slices)
        fork = tensor_parallel.get_cuda_rng_tracker().fork if self.inner.config.sequence_parallel else None
        with fork() if fork is not None else contextlib.nullcontext():  # as TransformerBlock: dropout of one's own part
            out, _ = self.inner(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
        return out  # type: ignore[no-any-return]


class FinalNorm(nn.Module):
    """The norm after the last layer, [sequence, batch, hidden] to the same."""

    def __init__(self, config: TransformerConfig, spec: Any) -> None:
        super().__init__()
        self.inner = build_module(spec, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden)  # type: ignore[no-any-return]


class OutputLayer(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """[sequence, batch, hidden] to this rank's slice of [sequence, batch, vocabulary]."""

    def __init__(self, config: TransformerConfig, vocab_size: int, **others: Any) -> None:
        super().__init__(
            config.hidden_size,
            vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            **others,
        )
        if self.weight is not None:
            marks.mark_embedding_or_head(self.weight)

    def forward(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        return super().forward(hidden, weight)[0]  # type: ignore[no-any-return]


def masked_loss(logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross entropy of what the mask counts.

    Args:
        logits: this rank's slice of [sequence, batch, vocabulary].
        targets: labels and mask, [batch, sequence].
    """
    labels, mask = targets
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous())
    counted = losses.transpose(0, 1) * mask
    return counted.sum() / mask.sum()  # type: ignore[no-any-return]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _checkpoint(function: Any, *arguments: Tensor) -> Any:
    """Megatron's, which knows its random states."""
    return tensor_parallel.checkpoint(function, False, *arguments)


def _refuse_unsupported(config: TransformerConfig, stages: int, positions: str) -> None:
    """Raises a SettingsError that names the first thing that a pipeline under DeepSpeed can't have."""
    MEGATRON.check()
    interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    refusals = (
        (positions not in _POSITIONS, f"position_embedding_type = '{positions}': must be one of {_POSITIONS}"),
        (
            config.num_layers % stages != 0,
            f"num_layers = {config.num_layers}: must be divisible by the {stages} pipeline stages",
        ),
        (interleaved is not None, f"virtual_pipeline_model_parallel_size = {interleaved}: DeepSpeed has no such thing"),
        (
            parallel_state.get_context_parallel_world_size() > 1,
            "context_parallel_size > 1: not supported in DeepSpeed's pipelines",
        ),
        (config.num_moe_experts is not None, "num_moe_experts: experts are not supported in DeepSpeed's pipelines"),
        (config.mtp_num_layers is not None, "mtp_num_layers: not supported in DeepSpeed's pipelines"),
        (bool(config.fp8 or config.fp4), "fp8 and fp4: not supported in DeepSpeed's pipelines"),
        (
            config.recompute_granularity == "full",
            "recompute_granularity = 'full': set pipeline.activation_checkpoint_interval in the DeepSpeed config",
        ),
    )
    for refused, message in refusals:
        if refused:
            raise SettingsError(message)


def _topology() -> PipeModelDataParallelTopology:
    """DeepSpeed's order of ranks, held against Megatron's groups on every rank.

    Raises:
        SettingsError: on all ranks, if the two differ on any.
    """
    megatrons = {
        "pipe": parallel_state.get_pipeline_model_parallel_group(),
        "model": parallel_state.get_tensor_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
    }
    sizes = {axis: dist.get_world_size(group) for axis, group in megatrons.items()}
    topology = PipeModelDataParallelTopology(num_pp=sizes["pipe"], num_mp=sizes["model"], num_dp=sizes["data"])
    own = {axis: list(dist.get_process_group_ranks(group)) for axis, group in megatrons.items()}
    for rank, groups in enumerate(gathered(own)):
        for axis, found in groups.items():
            expected = _group_of(rank, topology.get_axis_comm_lists(axis))
            if found != expected:
                raise SettingsError(
                    f"rank {rank} is in Megatron's {axis}-parallel group {found}, and would be in DeepSpeed's "
                    f"{expected}: call initialize_model_parallel with its default order, 'tp-cp-ep-dp-pp'"
                )
    return topology


def _group_of(rank: int, groups: Sequence[Sequence[int]]) -> list[int]:
    return next(list(group) for group in groups if rank in group)
