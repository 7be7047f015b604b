"""Models whose weights lie in rows on several devices, by FSDP2; no rank ever holds one whole.

Zhao et al. 2023 (arXiv 2304.11277), of which `fully_shard` is torch's second version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sift_cli.models.fingerprints import fingerprint, state_tensors
from sift_cli.models.loading import LoadedModel, drawn, load_tokenizer, on_meta, settle_padding
from sift_cli.models.names import all_names
from sift_cli.models.readout import WITHIN
from sift_cli.models.stored import Stored
from sift_cli.models.whole import Lack, left_out, require_whole
from sift_cli.sparse.local import Shards

REPLICAS, ROWS = "replicas", "rows"  # the axes of a mesh


@dataclass(frozen=True)
class Sharded:
    """A model in rows on several ranks: how they lie, and the base as its files have it.

    `kinds` has the dtype of each parameter and saved buffer, tied ones once.
    """

    shards: Shards
    stored: Stored
    kinds: Mapping[str, torch.dtype]

    @property
    def names(self) -> list[str]:
        """The names of its tensors."""
        return list(self.kinds)

    def base(self, name: str) -> Tensor:
        """A whole tensor of the base, on the host."""
        return self.stored.tensor(name).to(self.kinds[name])

    def mark(self, name: str) -> str:
        """Its fingerprint."""
        return fingerprint(self.base(name))


def mesh_of(device: torch.device, replicas: int = 1) -> DeviceMesh:
    """All ranks as `replicas` copies of the model, each in rows on as many ranks as are left.

    The second axis is that of rows: where a node holds one copy, only gradients leave it.
    """
    shape = (replicas, dist.get_world_size() // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=(REPLICAS, ROWS))


def shards_on(mesh: DeviceMesh) -> Shards:
    """How weights lie on the ranks of a mesh, for what trains of them."""
    rows, replicas = mesh[ROWS].get_group(), mesh[REPLICAS].get_group()
    count = mesh[ROWS].size()

    def reduce(parts: Tensor) -> Tensor:
        own = parts.new_empty(parts.shape[1])
        # torch 2.13 renames it
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(own, parts.view(-1), group=rows)
        if mesh[REPLICAS].size() > 1:
            dist.all_reduce(own, group=replicas)
        return own

    def total(number: Tensor) -> Tensor:
        summed = number.clone()
        dist.all_reduce(summed, group=rows)
        return summed

    def sizes_of(own: Tensor) -> list[int]:
        sizes = [torch.zeros((), dtype=torch.int64, device=own.device) for _ in range(count)]
        dist.all_gather(sizes, torch.tensor(len(own), device=own.device), group=rows)
        return [int(size) for size in sizes]

    def padded(own: Tensor, longest: int) -> Tensor:
        filled = own.new_zeros(longest, *own.shape[1:])
        filled[: len(own)] = own
        return filled

    def joined(own: Tensor) -> Tensor:
        sizes = sizes_of(own)
        mine = padded(own, max(sizes))
        every = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(every, mine, group=rows)
        return torch.cat([one[:size] for one, size in zip(every, sizes, strict=True)])

    def gathered(own: Tensor) -> Tensor:
        if mesh[REPLICAS].get_local_rank():
            return own[:0]  # another copy has the same
        sizes = sizes_of(own)
        mine = padded(own, max(sizes))
        every = [torch.empty_like(mine) for _ in sizes] if dist.get_rank() == 0 else None
        dist.gather(mine, every, dst=0, group=rows)
        if every is None:
            return own[:0]
        return torch.cat([one[:size].cpu() for one, size in zip(every, sizes, strict=True)])

    return Shards(count, mesh[ROWS].get_local_rank(), reduce, total, joined, gathered)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Deals the rows of a model's weights over a mesh, block by block, then what is left.

    What FSDP2 reduces (the gradients of norms, embeddings and tied weights) is the sum over ranks.
    """
    if mesh[REPLICAS].size() == 1:
        mesh = mesh[ROWS]
    for block in [*blocks_of(model), model]:
        # The root too, which would stay gathered after an evaluation: what looks for weights
        # between two passes finds this rank's rows.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(model, WITHIN, lambda work: work())
    register_fsdp_forward_method(model, WITHIN)


def load_sharded(
    folder: Path,
    auto: Any,
    config: PretrainedConfig,
    dtype: torch.dtype,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    new_head: bool = False,
) -> tuple[LoadedModel, Sharded]:
    """What `load_model` gives, in rows over a mesh: each rank reads its own rows from the files.

    With `new_head`, each draws the head that the files do not hold whole, and keeps its rows.
    Raises SiftError for what else the files do not fill.
    """
    tokenizer = load_tokenizer(folder)
    settle_padding(config, tokenizer)
    model = on_meta(folder, auto, config, dtype)
    stored = Stored(folder, model)
    new = require_whole(model, Lack.of_files(model, stored), stored, folder, new_head)
    if new:
        stored.hold(drawn(on_meta(folder, auto, config, dtype), new))
    shard(model, mesh)
    shards, first = shards_on(mesh), state_tensors(model)
    state = {name: _read(stored, name, one, shards, device) for name, one in first.items()}
    every = all_names(model)
    model.load_state_dict({n: state[every[n]] for n in model.state_dict()}, assign=True)
    _fill_buffers(model, device)
    model.eval()
    kinds = {name: one.dtype for name, one in state.items()}
    loaded = LoadedModel(model, tokenizer, new, left_out(model, stored))
    return loaded, Sharded(shards, stored, kinds)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost layers that a model repeats: what is gathered at once."""
    found: list[nn.Module] = []
    for child in model.children():
        found += [child] if isinstance(child, GradientCheckpointingLayer) else blocks_of(child)
    return found


def _read(stored: Stored, name: str, like: Tensor, shards: Shards, device: torch.device) -> Tensor:
    """A tensor of the files as it is in the model: of a parameter, this rank's rows."""
    source = stored.places[name]
    if not isinstance(like, DTensor):
        return source.read().to(device, like.dtype)
    rows = shards.rows(like.shape)
    own = source.rows(rows.start, rows.stop).to(device, like.dtype)
    placements = [Replicate()] * (like.device_mesh.ndim - 1) + [Shard(0)]
    whole = DTensor.from_local(
        own,
        like.device_mesh,
        placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return nn.Parameter(whole)


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Computes the buffers that no file holds, such as the frequencies of rotary positions."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_meta:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()
