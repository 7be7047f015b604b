"""Processes that hold a model in rows, on gloo, and what one process does with the same rows."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from signal import SIGTERM
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.models.prepare import recompute_activations
from sift_cli.models.readout import Readout
from sift_cli.recipe import load_recipe
from sift_cli.runs.ranks import Ranks
from sift_cli.runs.session import open_session
from sift_cli.sparse import SparseAdamW, SparseParameters, Support, attach
from sift_cli.sparse.local import Shards
from sift_cli.tasks.token_batches import padded
from sift_cli.tasks.token_loss import Chunks, token_loss
from sift_cli.training import train
from sift_cli.training.batches import steps_of
from sift_cli.training.choosing import selecting
from sift_cli.training.step import take_step
from sift_cli.training.watch import Watch
from tests.support.causal import EOS, causal_model, causal_rows
from tests.support.interruptions import at_call, signalled
from tests.support.ranks import exact_steps

STEPS, ROWS = 5, 6  # of which each step takes all


class Case(NamedTuple):
    """How a tiny model of fp64 trains: in so many copies, so many tokens at a time at the head.

    The head is that of `kind`; with `frozen`, it and the embedding stay as they are.
    """

    replicas: int = 1
    recompute: bool = False
    chunk: int | None = None
    kind: str = "llama-tied"
    frozen: bool = False

    @property
    def alone(self) -> "Case":
        """The same in one process that takes no shortcuts."""
        return self._replace(replicas=1, recompute=False, chunk=None)

    def model(self) -> PreTrainedModel:
        """The model before it trains."""
        return causal_model(self.kind)

    def supports(self, model: nn.Module) -> dict[str, Support]:
        """What trains of it."""
        supports = mixed_supports(model)
        return {n: s for n, s in supports.items() if not (self.frozen and "embed" in n)}


def mixed_supports(model: nn.Module, density: float = 0.1, seed: int = 0) -> dict[str, Support]:
    """Some entries of each matrix, one matrix and all vectors whole."""
    generator = torch.Generator().manual_seed(seed)
    supports = {}
    for name, weight in model.named_parameters():
        shape = tuple(weight.shape)
        if weight.dim() == 1 or name.endswith("1.self_attn.o_proj.weight"):
            supports[name] = Support(shape)
            continue
        chosen = torch.randperm(weight.numel(), generator=generator)
        supports[name] = Support.of(shape, chosen[: max(1, round(density * weight.numel()))])
    return supports


def share_of_loss(
    model: PreTrainedModel, step: int, chunk: int | None = None, rank: int = 0, ranks: int = 1
) -> Tensor:
    """This rank's share of a step's mean loss over tokens; of every so manieth row."""
    rows = causal_rows(ROWS, seed=step)
    total = sum(sum(label >= 0 for label in row["labels"][1:]) for row in rows)
    batch = padded(rows[rank::ranks], EOS)
    if chunk is not None:
        return token_loss(model, batch, Chunks(chunk, Readout())).sum / total
    logits = model(**{k: one for k, one in batch.items() if k != "labels"}).logits
    return (
        nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        / total
    )


def trained(
    model: PreTrainedModel,
    case: Case,
    shards: Shards | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> tuple[SparseParameters, dict[str, list[Tensor]]]:
    """The model after some steps as the case says; norms and gradients of each."""
    model.train()
    recompute_activations(model, case.recompute)
    parameters = attach(model, case.supports(model), shards=shards)
    optimizer = SparseAdamW(parameters, 3e-3, weight_decay=0.1)
    seen: dict[str, list[Tensor]] = {"norm": [], "gradient": []}
    for step in range(STEPS):
        share_of_loss(model, step, case.chunk, rank, ranks).backward()
        parameters.accept(parameters.message())
        seen["gradient"].append(parameters.all_of(parameters.grad).clone())
        seen["norm"].append(optimizer.clip(0.5))
        optimizer.step()
    seen["left"] = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return parameters, seen


def told(parameters: SparseParameters, seen: dict[str, list[Tensor]]) -> dict[str, Any]:
    """All that is to be equal to one process, from one that holds rows."""
    named = dict(parameters.model.named_parameters())
    whole = {n: getattr(one, "full_tensor", lambda one=one: one)() for n, one in named.items()}
    return {
        **seen,
        "masters": parameters.all_of(parameters.flat.detach()),
        "changes": {one.name: (one.base, one.now) for one in parameters.changes()},
        "weights": {name: one.detach().clone() for name, one in whole.items()},
        "owned": parameters.flat.numel(),
    }


def work_of_rank(rank: int, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What `trained` comes to in each case."""
    import torch.distributed as dist

    from sift_cli.models.sharding import mesh_of, shard, shards_on

    found = []
    for case in cases:
        model = case.model()
        mesh = mesh_of(torch.device("cpu"), case.replicas)
        shard(model, mesh)
        ranks = dist.get_world_size()
        found.append(told(*trained(model, case, shards_on(mesh), rank, ranks)))
    return found


def load_of_rank(rank: int, bases: Sequence[Path]) -> list[dict[str, Any]]:
    """How each base loads in rows, beside loading it whole."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from sift_cli.errors import SiftError
    from sift_cli.models.loading import load_model
    from sift_cli.models.sharding import load_sharded, mesh_of
    from sift_cli.models.shards import places_in
    from sift_cli.models.tensors import Place

    cpu, read, found = torch.device("cpu"), [0], []
    of_files = Place._read

    def counted(place: Place, start: int, shape: tuple[int, ...]) -> Tensor:
        tensor = of_files(place, start, shape)
        read[0] += tensor.nbytes
        return tensor

    for base in bases:
        config, read[0] = AutoConfig.from_pretrained(base), 0
        Place._read = counted  # type: ignore[method-assign]
        try:
            model = load_sharded(
                base, AutoModelForCausalLM, config, torch.float32, mesh_of(cpu), cpu
            )[0].model
        except SiftError as error:
            found.append({"refused": str(error)})
            continue
        finally:
            Place._read = of_files  # type: ignore[method-assign]
        whole = load_model(base, AutoModelForCausalLM, dtype=torch.float32).model
        ids = torch.arange(12).view(2, 6)
        with torch.no_grad():
            logits, of_one = (one(input_ids=ids).logits for one in (model, whole))
        found.append(
            {
                "bytes read": read[0],
                "bytes in files": sum(place.bytes for place in places_in(base).values()),
                "bytes held": sum(one.to_local().nbytes for one in model.parameters()),  # type: ignore[attr-defined]
                "tensors": _digests(model),
                "of one process": _digests(whole),
                "logits": logits,
                "logits of one process": of_one,
            }
        )
    return found


def _digests(model: nn.Module) -> dict[str, str]:
    """Of every parameter and buffer, under each of its names."""
    every = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    whole = {n: getattr(one, "full_tensor", lambda one=one: one)() for n, one in every.items()}
    return {name: fingerprint(one) for name, one in whole.items()}


FULL = "distributed.shard=full"


def runs_of_rank(
    rank: int, folder: Path, settings: Mapping[str, tuple[Path, Sequence[str]]], stopped_in: int
) -> None:
    """A run of each recipe and its changes; one that is stopped, and one that goes on."""
    out = folder / "several"
    for name, (recipe, changes) in settings.items():
        train(load_recipe(recipe, changes), out / name, device="cpu")
    changing = load_recipe(*settings["drop-grow"])
    train(changing, out / "resumed", device="cpu", resume=True)
    asked = at_call(stopped_in, signalled(SIGTERM)) if rank else nullcontext()
    try:
        with asked:
            train(changing, out / "stopped", device="cpu")
    except (SiftError, SystemExit) as error:
        code = error.code
    assert code == ExitCode.INTERRUPTED


def exact_run_of_rank(rank: int, recipe: Path, changes: Sequence[str], out: Path) -> None:
    """A run that rounds to the model's dtype alone."""
    with exact_steps():
        train(load_recipe(recipe, changes), out, device="cpu")


class Sent(TorchDispatchMode):
    """Notes the collectives within it by torch's names, and the bytes that this rank gives each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # what is gathered or scattered stands behind what it becomes
            given = args[1] if isinstance(args[1], Tensor) else args[0]
            tensors = [given] if isinstance(given, Tensor) else given
            name = func.overloadpacket.__name__.strip("_")
            self.calls.append((name, sum(one.nbytes for one in tensors)))
        return func(*args, **(kwargs or {}))


def sent_of_rank(
    rank: int, recipe: Path, settings: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """What the second step of each settings sends, and the entries that train."""
    import torch.distributed as dist

    ranks = Ranks(rank, dist.get_world_size()).in_rows(replicas=1, of_recipe=True)
    found = {}
    for name, changes in settings.items():
        resolved = load_recipe(recipe, changes)
        session = open_session(resolved, device="cpu", ranks=ranks)
        assert session.train is not None
        batches = steps_of(resolved.train, session.train.lengths, session.task.packs)
        optimizer = selecting(resolved)(session, batches).begin()
        session.model.train()
        watch = Watch(session, optimizer.parameters)
        for step, rows in enumerate(islice(batches.since(1), 2), 1):
            with Sent() as sent:
                take_step(session, optimizer, step, rows, watch.broken, max_grad_norm=1.0)
        supports = {key: one.positions for key, one in optimizer.parameters.supports.items()}
        found[name] = {"sent": sent.calls, "supports": supports}
    return found
