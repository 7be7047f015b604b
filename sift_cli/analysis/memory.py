"""What a training step holds in memory, counted on tensors without data.

The model is built from its configuration alone and takes a step as it would in training: the same
layers, the same backward pass, the same optimizer, on tensors that have a shape, a dtype and a
device but no storage (torch's FakeTensorMode). A ledger notes when each storage comes and goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sift_cli.analysis.ledger import Ledger
from sift_cli.models.attention import replace_sdpa
from sift_cli.models.devices import autocast
from sift_cli.models.dropout import first_part_alone, quicken_dropout
from sift_cli.models.prepare import Recompute, recompute_activations
from sift_cli.selection.evidence import observed_gradients
from sift_cli.sparse import SparseAdamW, Support, attach
from sift_cli.sparse.kernels import CROWDED, Axis, Kernel, dense, product, samples, take, widen
from sift_cli.tasks.classification import task_of_labels
from sift_cli.tasks.task import Task

GPU_ATTENTION = "sift_plan"
RATE, CLIP = 1e-3, 1.0  # any: tensors without data take the same memory
TWO_CLASSES = task_of_labels(("0", "1"))
PARTS = (
    "weights",
    "positions",
    "base_values",
    "masters",
    "gradients",
    "moments",
    "activations",
    "transient",
)


@dataclass(frozen=True)
class Batch:
    """The shape of a batch: rows x tokens, with a mask if `padded`, and the task it is of.

    Of a task that learns tokens, `learnt` of these are (None: all). A batch that is `packed` holds
    rows end to end, told apart by positions.
    """

    rows: int
    tokens: int
    padded: bool = True
    task: Task = TWO_CLASSES
    learnt: int | None = None
    packed: bool = False

    def make(self) -> dict[str, Tensor]:
        """The tensors that the model is called with."""
        ids = torch.ones(self.rows, self.tokens, dtype=torch.long)
        made = self.task.example(ids)
        if "predicts" in made:
            made["predicts"] = made["predicts"][: self.learnt].clone()
        if self.packed:
            return made | {"position_ids": torch.zeros_like(ids)}
        return made | ({"attention_mask": torch.ones_like(ids)} if self.padded else {})


@dataclass(frozen=True)
class Ready:
    """A model about to train.

    `update` clips, steps and clears gradients. `parts` gives the tensors that are held from step to
    step by part; it can be called once a step has been made.
    """

    model: nn.Module
    update: Callable[[], object]
    parts: Callable[[], Mapping[str, Iterable[Tensor]]]


Prepare = Callable[[Any], Ready]  # decides what of a model trains


@dataclass(frozen=True)
class PeakMemory:
    """The bytes that a model holds at the peak of a pass over `batch`, counted by part.

    `build` makes the model on the meta device. `gpu` takes the attention, the masks and the kernels
    of a GPU instead of those of a CPU.
    """

    build: Callable[[], Any]
    batch: Batch
    checkpointing: Recompute = False
    bf16: bool = False
    gpu: bool = False

    def step(self, prepare: Prepare) -> dict[str, int]:
        """The bytes of each of PARTS in a training step, which sum to the peak.

        `prepare` decides what of the model trains. `activations` are what the forward pass made,
        `transient` what the backward pass and the optimizer did and no part is named for.
        """
        with numberless():
            model, ledger = self._open()
            with ledger:
                ledger.phase = "positions"
                ready = prepare(model)
                ledger.phase = "transient"
                ready.update()  # makes the moments
                inputs = self.batch.make()
                start = ledger.now()
                self._pass(ready.model, inputs, ledger)
                for part, tensors in ready.parts().items():
                    ledger.name(part, tensors)
                ready.update()
        return self._parts(ledger, start)

    def selection(
        self, names: Iterable[str], batches: int = 1, squares: bool = False, descends: bool = False
    ) -> dict[str, int]:
        """Bytes by part of the pass that ranks the gradients of the weights called `names`.

        What gathers of several batches is called `gradients`: their sums, with `squares` those of
        squares as well; where it `descends`, bases and votes in place of both.
        """

        def rank(name: str, gradient: Tensor) -> None:
            scores = gradient.abs().reshape(-1)
            if descends:
                weight = named[name].detach()
                sums.setdefault((name, "base"), torch.zeros_like(weight))
                sums.setdefault((name, "votes"), torch.zeros_like(weight, dtype=torch.int16))
            elif batches == 1:
                scores.topk(max(1, len(scores) // 100))
            else:
                for kind in ("gradient", "squares")[: 1 + squares]:
                    sums.setdefault((name, kind), torch.zeros_like(scores))

        sums: dict[tuple[str, str], Tensor] = {}
        with numberless():
            model, ledger = self._open()
            named = dict(model.named_parameters())
            model.requires_grad_(False)
            with ledger, observed_gradients({name: named[name] for name in names}, rank):
                for _ in range(min(2, batches)):
                    self._pass(model, self.batch.make(), ledger)
            ledger.name("gradients", sums.values())
        return self._parts(ledger)

    def evaluation(self) -> dict[str, int]:
        """Bytes by part of a forward pass without gradients."""
        with numberless():
            model, ledger = self._open()
            model.eval()
            with ledger, torch.inference_mode(), autocast(torch.device("cpu"), self.bf16):
                ledger.phase = "activations"
                self.batch.task.outputs(model, self.batch.make())
        return self._parts(ledger)

    def _open(self) -> tuple[Any, Ledger]:
        model = self.build()
        on_host(model)
        model.train()
        if self.gpu:  # first: attention that is not torch's own stays as it is
            replace_sdpa(model, GPU_ATTENTION, _gpu_attention, _mask)
        quicken_dropout(model)
        recompute_activations(model, self.checkpointing)
        ledger = Ledger()
        ledger.phase = "weights"
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.note(tensor)
        return model, ledger

    def _pass(self, model: Any, inputs: dict[str, Tensor], ledger: Ledger) -> None:
        ledger.phase = "activations"
        with autocast(torch.device("cpu"), self.bf16):
            loss = self.batch.task.loss(model, inputs).sum
        ledger.phase = "transient"
        loss.backward()

    @staticmethod
    def _parts(ledger: Ledger, since: int = 0) -> dict[str, int]:
        parts = dict.fromkeys(PARTS, 0)
        for one in ledger.peak(since)[1]:
            parts[one.phase] += one.nbytes
        return parts


def _gpu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """torch's memory-efficient attention, called directly: tensors without data lie on a CPU, for
    which torch would choose another one."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (one.repeat_interleave(repeats, dim=1) for one in (key, value))
    bias = None
    if attention_mask is not None:
        bias = torch.zeros(attention_mask.shape, dtype=query.dtype)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    out = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout, attention_mask is None, scale=scaling
    )[0]
    return out.transpose(1, 2).contiguous(), None


def _mask(**kwargs: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    made: Tensor | None = sdpa_mask(**kwargs)
    return made


@contextmanager
def numberless() -> Iterator[None]:
    """Within, new tensors have no data, and what repeats itself in parts is done once."""
    with FakeTensorMode(), first_part_alone(), _first_expert_alone():
        yield


@contextmanager
def _first_expert_alone() -> Iterator[None]:
    """Within, one expert takes the tokens of all: which go where, numbers alone would tell."""
    moe: Any = import_module("transformers.integrations.moe")

    def product(inputs: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        return inputs.to(weight.dtype) @ weight[0]

    before = moe._grouped_mm
    moe._grouped_mm = product
    try:
        yield
    finally:
        moe._grouped_mm = before


def on_host(model: nn.Module) -> None:
    """Turns a model on the meta device into one whose tensors say that they lie on a CPU."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in made:
                    fake = torch.empty(weight.shape, dtype=weight.dtype)
                    made[id(weight)] = nn.Parameter(fake, weight.requires_grad)
                module._parameters[name] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def sparse(
    counts: Mapping[str, int],
    dense: Iterable[str],
    structure: str = "entry",
    block: int = 1,
    gpu: bool = False,
    coordinates: int = 0,
) -> Prepare:
    """Sparse training as `sift train` prepares it: of each weight in `counts` so many entries, and
    the parameters `dense` whole; each entry has so many `coordinates` beside its master."""

    def prepare(model: Any) -> Ready:
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        supports = {name: Support(shapes[name]) for name in dense}
        for name, count in counts.items():
            positions = torch.empty(count, dtype=torch.int32)
            full = count == prod(shapes[name])
            supports[name] = Support(shapes[name], None if full else positions)
        parameters = attach(model, supports, likely_kernel(structure, block, gpu))
        optimizer = SparseAdamW(parameters, RATE)
        beside = [torch.empty_like(parameters.flat) for _ in range(coordinates)]

        def update() -> None:
            optimizer.clip(CLIP)
            optimizer.step()

        def parts() -> dict[str, list[Tensor]]:
            return {
                "base_values": [values for _, _, values in parameters.touched],
                "masters": [parameters.flat, *beside],
                "gradients": [parameters.grad],
                "moments": list(optimizer.adamw.state[parameters.flat].values()),
            }

        return Ready(model, update, parts)

    return prepare


def ordinary(model: Any) -> Ready:
    """Training of every weight that requires a gradient, with torch's own AdamW."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, fused=True)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    def parts() -> dict[str, list[Tensor]]:
        return {
            "weights": trained,
            "gradients": [weight.grad for weight in trained if weight.grad is not None],
            "moments": [one for state in optimizer.state.values() for one in state.values()],
        }

    return Ready(model, update, parts)


def likely_kernel(
    structure: str, block: int = 1, gpu: bool = False
) -> Callable[[Support, torch.device], Kernel]:
    """Picks the kernel that `sparse.kernels.choose` would for random entries, or random blocks."""
    device = torch.device("cuda" if gpu else "cpu")

    def kernel(support: Support, _: torch.device) -> Kernel:
        if support.positions is None:
            return dense(support)
        entries, (high, wide) = len(support), support.shape
        edge = {"entry": 1, "block": block}.get(structure)
        if edge is not None:
            units = entries // edge**2
            rows, columns = (edge * hit(size // edge, units) for size in (high, wide))
        else:
            rows, columns = (
                (entries // wide, wide) if structure == "row" else (high, entries // high)
            )
        axes = (_axis(entries, rows, high), _axis(entries, columns, wide))
        if not samples(entries, axes[0].count, axes[1].count, device):
            return product(support, axes)
        return _sampled(entries, *axes)

    return kernel


def hit(places: int, throws: int) -> int:
    """How many of `places` at least one of so many random throws hits, on average."""
    return round(places * (1 - (1 - 1 / places) ** throws)) if places > 1 else places


def _axis(entries: int, count: int, size: int) -> Axis:
    local = torch.empty(entries, dtype=torch.int64)
    if count > CROWDED * size:
        return Axis(None, local, size)
    return Axis(torch.empty(count, dtype=torch.int64), local, count)


def _sampled(entries: int, rows: Axis, columns: Axis) -> Kernel:
    """A stand-in for the kernel `sampled` that holds and makes tensors of the same sizes: sparse
    products do not run on tensors without data."""
    used, starts = rows.used, rows.count + 1
    tables = torch.empty(starts + entries, dtype=torch.int32)

    def gradient(grad_out: Tensor, inputs: Tensor) -> Tensor:
        left = widen(take(grad_out, used)).t().contiguous()
        right = widen(inputs).t().contiguous()
        pattern = torch.zeros(entries, dtype=left.dtype)
        del left, right, pattern
        return torch.empty(len(tables) - starts, dtype=torch.float32)

    return Kernel("sampled", gradient, columns.used)
