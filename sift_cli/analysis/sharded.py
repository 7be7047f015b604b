"""What a rank holds and sends where the model lies in rows on several, from what one would.

Counted of FSDP2 (Zhao et al. 2023, arXiv 2304.11277) as `models.sharding` sets it up: a block is
gathered for its forward pass and again for its backward pass, and the next one meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sift_cli.models.loading import DTYPES
from sift_cli.recipe import Recipe
from sift_cli.runs.ranks import Ranks
from sift_cli.sparse.wiring import plain_linear_layers

DEALT = ("weights", "base_values", "masters", "gradients", "moments")  # a rank has its own alone
POSITION = 4  # bytes


@dataclass(frozen=True)
class Rows:
    """A model of which each of `copies` lies in rows on so many `ranks`.

    Bytes of its weights: of all, of the `root` (those in no block), and of the largest `block`.
    """

    ranks: int
    copies: int
    total: int
    root: int
    block: int

    @classmethod
    def of(cls, model: nn.Module, devices: int, copies: int) -> Rows:
        """Those of a model on so many devices."""
        from sift_cli.models.sharding import blocks_of  # slow to import

        blocks = [_bytes(block) for block in blocks_of(model)]
        total = _bytes(model)
        return cls(devices // copies, copies, total, total - sum(blocks), max(blocks, default=0))

    @property
    def gathered(self) -> int:
        """Bytes of weights that are whole on a rank at one time."""
        return self.root + 2 * self.block

    def hold(
        self,
        parts: Mapping[str, int],
        unsummed: int = 0,
        positions: int = 0,
        *,
        exchanges: bool = False,
    ) -> dict[str, int]:
        """Bytes by part of a rank, of those that one device would hold (`analysis.memory.PARTS`).

        `unsummed` are those of gradients of which other ranks have theirs, beside the sums that
        are the rank's own; `positions` those of one number for each entry. A rank that `exchanges`
        copies the unsummed for it, when activations are gone: the larger of both moments counts.
        """
        held = {part: parts[part] for part in parts}
        held |= {part: -(-parts[part] // self.ranks) for part in DEALT}
        held["gradients"] += unsummed
        held["positions"] += -(-positions // self.ranks)
        passing = {"activations": parts["activations"], "transient": parts["transient"]}
        passing["gathered"] = self.gathered
        copied = unsummed + -(-unsummed // self.ranks)
        if exchanges and copied > sum(passing.values()):
            passing = {**dict.fromkeys(passing, 0), "transient": copied}
        order = ("weights", "gathered", *(part for part in parts if part != "weights"))
        held |= passing
        return {part: held[part] for part in order}

    def hold_of(
        self, method: str, parts: Mapping[str, int], model: nn.Module, counts: Mapping[str, int]
    ) -> dict[str, int]:
        """`hold` of a method of a plan, where `counts` entries of each weight of the model train.

        LoRA sums its gradients once a step, as sift does; full fine-tuning those of each block when
        its backward pass is done.
        """
        if method == "full":
            return self.hold(parts, self.gathered)
        if method == "lora":
            return self.hold(parts, parts["gradients"], exchanges=True)
        sizes = {name: weight.numel() for name, weight in model.named_parameters()}
        listed = sum(count for name, count in counts.items() if count < sizes[name])
        share = linear_entries(model, counts) / max(1, sum(counts.values()))
        return self.hold(
            parts, round(share * parts["gradients"]), POSITION * listed, exchanges=True
        )

    def sent(
        self, linear: int, others: int, whole: int, dtype: str, batches: int = 1
    ) -> dict[str, dict[str, int]]:
        """Bytes that each rank sends in a step of so many micro-batches, by method and purpose.

        Rings (Patarasuk and Yuan 2009): (R - 1) / R of a message to gather or to scatter it, twice
        that for a sum that all have. `linear` entries of plain linear layers train, and `others` in
        weights of `whole` entries in all, which FSDP2 sums densely in every micro-batch. Sift and
        LoRA send fp32 once a step, full fine-tuning the dtype of the weights in each micro-batch
        and once between copies. The few numbers of loss and norm are left out.
        """
        dense = whole * DTYPES[dtype].itemsize * batches
        once, every = 4 * linear + dense, self.total * batches
        summed = {
            "sift": (once, once),
            "lora": (4 * (linear + others),) * 2,
            "full": (every, self.total),
        }
        share = (self.ranks - 1) / self.ranks
        between = 2 * (self.copies - 1) / self.copies / self.ranks
        return {
            method: {
                "weights": round(share * 2 * every),
                "gradients": round(share * inside),
                "between_copies": round(between * outside),
            }
            for method, (inside, outside) in summed.items()
        }

    def sent_of(
        self, model: nn.Module, counts: Mapping[str, int], dtype: str, batches: int
    ) -> dict[str, Any]:
        """`sent` of the entries of each weight that train: the sums by method, and what for."""
        linear = linear_entries(model, counts)
        named, plain = dict(model.named_parameters()), plain_linear_layers(model)
        whole = sum(named[name].numel() for name in counts if id(named[name]) not in plain)
        others = sum(counts.values()) - linear
        each = self.sent(linear, others, whole, dtype, batches)
        return {
            "replicas": self.copies,
            "sent_bytes": {method: sum(parts.values()) for method, parts in each.items()},
            "sent_by_part": each,
        }


def ranks_of(recipe: Recipe, devices: int) -> Ranks:
    """A rank of a run of the recipe on so many devices.

    Raises SiftError, as training does, where they hold no whole number of copies of the model.
    """
    ranks, shared = Ranks(world=devices), recipe.distributed
    return ranks if shared.shard == "none" else ranks.in_rows(shared.replicas, of_recipe=True)


def linear_entries(model: nn.Module, counts: Mapping[str, int]) -> int:
    """How many of the entries belong to plain linear layers, whose gradients ranks exchange."""
    named, plain = dict(model.named_parameters()), plain_linear_layers(model)
    return sum(count for name, count in counts.items() if id(named[name]) in plain)


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())
