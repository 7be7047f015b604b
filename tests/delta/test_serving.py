"""Deltas on a model in memory: apply, undo, swap, and what is refused."""

import copy
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sift_cli import Delta
from sift_cli.delta import save_delta, serving
from sift_cli.delta.file import weight_delta
from sift_cli.delta.header import Base, Header
from sift_cli.delta.identity import rest_fingerprints
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint, state_fingerprints
from sift_cli.sparse import Support
from tests.support.models import save_base, tiny_batch, tiny_model

HEAD = ["classifier.weight", "classifier.bias"]


def random_delta(model: nn.Module, seed: int, dense: list[str], density: float = 0.1) -> Delta:
    """Random changes to every matrix of `model`, which stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    marks = state_fingerprints(model, dense)
    weights, heads = {}, {}
    for name, weight in model.named_parameters():
        if name in dense:
            heads[name] = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        elif weight.dim() == 2:
            count = max(1, int(density * weight.numel()))
            chosen = torch.randperm(weight.numel(), generator=generator)[:count]
            support = Support.of(weight.shape, chosen)
            before = support.gather(weight)
            after = before + torch.randn(before.shape, generator=generator).to(before.dtype)
            whole = weight.detach().clone()
            support.scatter_(whole, after)
            weights[name] = weight_delta(support, before, after, marks[name], whole)
    header = Header(base=Base(path="base", dtype="float32"), task=f"task{seed}", labels=None)
    return Delta(weights, heads, rest_fingerprints(marks, weights), header)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.clone().view(torch.uint8) for n, v in model.state_dict().items() if v.dim()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_thousand_random_swaps_leave_every_bit(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, dtype)
    head = HEAD if architecture == "bert" else ["score.weight"]
    before = bits(model)
    deltas = [random_delta(model, seed, head, density=(0.1, 0.3, 1.0)[seed]) for seed in range(3)]
    wanted = []
    for delta in deltas:
        delta.apply_(model)
        wanted.append(bits(model))
        named = dict(model.named_parameters())
        for name, weight in delta.weights.items():  # against the fingerprints of training
            assert fingerprint(named[name]) == weight.trained
        assert all(torch.equal(named[name], one) for name, one in delta.dense.items())
        delta.undo_(model)
        assert same(bits(model), before)
    rng = random.Random(0)
    on = None
    for _ in range(1000):
        choice = rng.randrange(4)
        if choice == 3 and on is not None:
            deltas[on].undo_(model)
            on = None
        elif choice < 3:
            deltas[choice].swap_(model)
            on = choice
        if rng.random() < 0.05:
            assert same(bits(model), before if on is None else wanted[on])
    deltas[0].swap_(model)
    assert same(bits(model), wanted[0])
    deltas[0].undo_(model)
    assert same(bits(model), before)


def test_swaps_under_deterministic_algorithms() -> None:
    model = tiny_model("bert", torch.float32)
    before = bits(model)
    one, other = (random_delta(model, seed, HEAD) for seed in (1, 2))
    torch.use_deterministic_algorithms(True)
    try:
        for delta in (one, other, one):
            delta.swap_(model)
        trained = bits(model)
        one.undo_(model)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(bits(model), before)
    one.apply_(model)
    assert same(bits(model), trained)


def test_swaps_read_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert", torch.float32)
    one, other = (random_delta(model, seed, HEAD) for seed in (1, 2))
    one.apply_(model)
    other.swap_(model)

    def read(*args: object) -> str:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(serving, "fingerprint", read)
    monkeypatch.setattr(serving, "state_fingerprints", read)
    for _ in range(3):
        one.swap_(model)
        other.swap_(model)
    other.undo_(model)
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] += 0  # a write is a write
    with pytest.raises(AssertionError, match="a tensor was read"):
        one.apply_(model)


def refuses(said: str) -> object:
    return pytest.raises(SiftError, match=said)


def test_double_and_foreign_application_are_refused() -> None:
    model = tiny_model("bert", torch.float32)
    one, other = (random_delta(model, seed, HEAD) for seed in (1, 2))
    with refuses("is not the merged model"):
        one.undo_(model)
    one.apply_(model)
    now = bits(model)
    for call, said in (
        (one.apply_, r"on the model already \(the task1 delta\); undo it first, or swap"),
        (other.apply_, "on the model already"),
        (other.undo_, "cannot undo the task2 delta: the task1 delta is on the model"),
    ):
        with refuses(said) as caught:
            call(model)
        assert caught.value.code == ExitCode.WRONG_FILE
        assert same(bits(model), now)
    one.swap_(model)  # it is there
    assert same(bits(model), now)
    one.undo_(model)
    with refuses("cannot undo the task1 delta: no delta is on the model"):
        one.undo_(model)
    stranger = tiny_model("bert", torch.float32, seed=1)
    with refuses("is not the base of this delta"):
        one.apply_(stranger)
    with refuses("is not the base of this delta"):
        random_delta(stranger, 3, HEAD).swap_(model)


def test_a_copy_is_another_model() -> None:
    model = tiny_model("bert", torch.float32)
    before = bits(model)
    delta = random_delta(model, 1, [])
    delta.apply_(model)
    twin = copy.deepcopy(model)
    with refuses("is not the base"):
        delta.apply_(twin)
    delta.undo_(twin)
    assert same(bits(twin), before)
    assert not same(bits(model), before)
    delta.apply_(twin)
    assert same(bits(twin), bits(model))


@pytest.mark.parametrize("where", ["touched", "untouched", "head", "replaced", "step"])
def test_a_model_that_something_else_changed_is_refused(where: str) -> None:
    model = tiny_model("bert", torch.float32)
    one, other = (random_delta(model, seed, HEAD) for seed in (1, 2))
    one.apply_(model)
    with torch.no_grad():
        if where == "touched":
            model.bert.pooler.dense.weight[0, 0] += 1
        elif where == "untouched":
            model.bert.pooler.dense.bias[0] += 1
        elif where == "head":
            model.classifier.bias[0] += 1
        elif where == "replaced":
            model.bert.pooler.dense.bias = nn.Parameter(torch.ones(16))
    if where == "step":
        model(**tiny_batch()).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    now = bits(model)
    for call in (one.undo_, other.swap_, other.apply_):
        with refuses("something else has changed the model"):
            call(model)
        assert same(bits(model), now)


def test_what_changes_no_value_is_no_change() -> None:
    model = tiny_model("bert", torch.float32)
    before = bits(model)
    one, other = (random_delta(model, seed, HEAD) for seed in (1, 2))
    one.apply_(model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    other.swap_(model)
    model.bert.pooler.dense.weight = nn.Parameter(model.bert.pooler.dense.weight.clone())
    other.undo_(model)
    assert same(bits(model), before)


def test_a_head_of_another_size_is_told_of_first() -> None:
    model = tiny_model("bert", torch.float32)
    delta = random_delta(tiny_model("bert", torch.float32, outputs=5), 1, HEAD)
    model.load_state_dict(tiny_model("bert", torch.float32, outputs=5).bert.state_dict(), False)
    for name, value in tiny_model("bert", torch.float32, outputs=5).state_dict().items():
        if name not in HEAD:
            model.state_dict()[name].copy_(value)
    before = bits(model)
    with refuses(r"classifier.weight: the delta brings one of shape \(5, 16\), the model has"):
        delta.apply_(model)
    assert same(bits(model), before)


def test_the_same_file_loaded_twice_is_one_delta(tmp_path: Path) -> None:
    model = tiny_model("bert", torch.float32)
    before = bits(model)
    save_delta(tmp_path / "d", random_delta(model, 1, HEAD))
    Delta.load(tmp_path / "d").apply_(model)
    with refuses("on the model already"):
        Delta.load(str(tmp_path / "d")).apply_(model)
    Delta.load(tmp_path / "d").undo_(model)
    assert same(bits(model), before)


def test_models_and_deltas_are_let_go() -> None:
    import gc
    import weakref

    model = tiny_model("bert", torch.float32)
    delta = random_delta(model, 1, HEAD)
    delta.apply_(model)
    gone = weakref.ref(model), weakref.ref(delta)
    del model, delta
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None


def test_an_interrupted_swap_leaves_a_model_that_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("bert", torch.float32)
    one, other = (random_delta(model, seed, HEAD) for seed in (1, 2))
    one.apply_(model)
    calls = []
    write = serving.Entries.write_

    def stop(self: serving.Entries, *args: Tensor) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(serving.Entries, "write_", stop)
    with pytest.raises(KeyboardInterrupt):
        other.swap_(model)
    monkeypatch.undo()
    for call in (one.undo_, one.apply_, other.swap_):
        with refuses("is not the"):
            call(model)


def test_importing_sift_stays_free_of_torch() -> None:
    code = "import sys, sift_cli; print('torch' in sys.modules, sift_cli.Delta.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Delta"]
    with pytest.raises(ImportError):
        from sift_cli import Gamma  # noqa: F401


def test_the_page_runs(tmp_path: Path) -> None:
    """The Python of docs/serving.md, word for word, on tiny deltas."""
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code

    base = save_base(tmp_path / "base")
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    for seed, task in enumerate(("sst2", "rte")):
        (tmp_path / "runs" / task).mkdir(parents=True)
        file = tmp_path / "runs" / task / "delta.safetensors"
        save_delta(file, random_delta(model, seed, HEAD))
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
