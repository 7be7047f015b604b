"""Every way to compute a selected gradient, against the dense one in float64."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sift_cli.sparse import Support, attach, kernels
from sift_cli.sparse.kernels import (
    Axis,
    Kernel,
    block_size,
    blocks,
    choose,
    dense,
    product,
    sampled,
    triton,
)
from sift_cli.sparse.saved import to_save

CPU = torch.device("cpu")
TRITON = find_spec("triton") is not None


def where(mask: Tensor) -> Support:
    """The support of a [m, n] mask."""
    return Support.of(mask.shape, mask.reshape(-1).nonzero().flatten())


def block_support(shape: tuple[int, int], size: int, tiles: list[int]) -> Support:
    """Whole blocks, by their number in row-major order."""
    mask = torch.zeros(shape, dtype=torch.bool)
    across = shape[1] // size
    for tile in tiles:
        row, column = tile // across * size, tile % across * size
        mask[row : row + size, column : column + size] = True
    return where(mask)


def rows_of(shape: tuple[int, int], rows: list[int]) -> Support:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[rows] = True
    return where(mask)


def columns_of(shape: tuple[int, int], columns: list[int]) -> Support:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, columns] = True
    return where(mask)


def scattered(shape: tuple[int, int], count: int) -> Support:
    generator = torch.Generator().manual_seed(1)
    return Support.of(shape, torch.randperm(shape[0] * shape[1], generator=generator)[:count])


def held(kernel: Kernel) -> int:
    """Bytes of the tensors that a kernel keeps from step to step."""
    cells = [cell.cell_contents for cell in kernel.gradient.__closure__ or ()]
    for one in list(cells):
        cells += [cell.cell_contents for cell in getattr(one, "__closure__", None) or ()]
    found = {id(one): one.nbytes for one in [*cells, kernel.columns] if isinstance(one, Tensor)}
    assert not any(isinstance(one, Axis) for one in cells)
    return sum(found.values())


@pytest.mark.parametrize("make", [product, sampled])
def test_a_kernel_holds_four_bytes_an_entry(make: Callable[[Support], Kernel]) -> None:
    rows, columns, count = 100, 300, 6000
    for reach in (rows * columns, rows * columns // 2):  # all rows, and half of them
        support = Support.of((rows, columns), torch.randperm(reach)[:count])
        assert held(make(support)) <= 4 * count + 8 * (rows + columns)


def by(kernel: Kernel, grad_out: Tensor, inputs: Tensor) -> Tensor:
    kept = inputs if kernel.columns is None else inputs[:, kernel.columns]
    return kernel.gradient(grad_out, kept)


SUPPORTS = {
    "one entry": Support.of((5, 3), torch.tensor([7])),
    "half": scattered((64, 48), 1500),
    "few": scattered((64, 48), 20),
    "one row weight": scattered((1, 7), 3),
    "rows": rows_of((12, 20), [0, 5, 11]),
    "columns": columns_of((12, 20), [3, 4, 19]),
    "crowded columns": columns_of((12, 20), list(range(18))),
    "blocks": block_support((16, 24), 4, [0, 3, 7, 8, 23]),
}


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("name", SUPPORTS)
def test_every_kernel_gives_the_dense_gradient(name: str, tokens: int) -> None:
    support = SUPPORTS[name]
    rows, columns = support.shape
    generator = torch.Generator().manual_seed(2)
    grad_out = torch.randn(tokens, rows, dtype=torch.float64, generator=generator)
    inputs = torch.randn(tokens, columns, dtype=torch.float64, generator=generator)
    assert support.positions is not None
    by_hand = torch.stack(
        [grad_out[:, p // columns] @ inputs[:, p % columns] for p in support.positions.tolist()]
    )
    kernels = [dense(support), product(support), sampled(support), choose(support, CPU)]
    kernels += [blocks(support, 4)] if name == "blocks" else []
    kernels += [triton(support)] if TRITON else []
    for kernel in kernels:
        found = by(kernel, grad_out, inputs)
        torch.testing.assert_close(found, by_hand, msg=lambda m, k=kernel: f"{k.name}: {m}")
        narrow = by(kernel, grad_out.bfloat16(), inputs.bfloat16())
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), by_hand, rtol=5e-2, atol=1e-1)


def test_whole_rows_and_columns_read_no_more_than_they_need() -> None:
    kernel = choose(columns_of((40, 60), [3, 50]), CPU)
    assert kernel.columns is not None
    assert kernel.columns.tolist() == [3, 50]
    assert kernel.name == "product"
    assert choose(rows_of((40, 60), [1]), CPU).columns is None


def test_the_cheapest_kernel_is_chosen() -> None:
    assert choose(scattered((400, 400), 1600), CPU).name == "sampled"
    assert choose(scattered((400, 400), 40_000), CPU).name == "product"
    assert choose(Support((100, 100)), CPU).name == "dense"
    assert choose(block_support((400, 400), 16, [0, 1, 2]), CPU).name == "product"


@pytest.mark.parametrize("there", [True, False])
def test_on_a_gpu_few_entries_are_sampled_and_many_are_not(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there and not TRITON:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(kernels, "find_spec", lambda name: there or None)
    cuda = torch.device("cuda")
    assert choose(scattered((400, 400), 1600), cuda).name == "product"
    some, few = (scattered((2000, 2000), count) for count in (10_000, 4_000))
    assert choose(some, cuda).name == ("triton" if there else "product")
    assert choose(few, cuda).name == ("triton" if there else "sampled")


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_size_of_blocks_is_read_off_the_support(size: int) -> None:
    support = block_support((32, 64), size, [1, 5, 6])
    assert block_size(support) % size == 0
    assert block_size(scattered((32, 64), 30)) == 1


def test_blocks_with_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="whole blocks of 4 x 4"):
        blocks(scattered((16, 16), 9), 4)


class Layers(nn.Module):
    """Linear layers behind each operation whose output need not be held."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.second = nn.Linear(16, 16)
        self.third = nn.Linear(16, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)))
        x = self.third(F.gelu(x, approximate="tanh"))
        return self.last(F.silu(x) * (x + 1))


def gradients(model: nn.Module, x: Tensor, supports: dict[str, Support], mode: str) -> Tensor:
    parameters = attach(model, supports)
    forward = (
        torch.compile(model, backend="aot_eager", fullgraph=True) if mode == "compiled" else model
    )
    out = checkpoint(forward, x, use_reentrant=False) if mode == "checkpointed" else forward(x)
    out.square().sum().backward()
    found = parameters.grad.clone()
    parameters.detach()
    return found


@pytest.mark.filterwarnings("ignore")  # of the compiler's own making
@pytest.mark.parametrize("mode", ["plain", "checkpointed", "compiled"])
@pytest.mark.parametrize("kind", ["entry", "column"])
def test_inputs_made_again_give_the_dense_gradient(mode: str, kind: str) -> None:
    torch.manual_seed(0)
    model = Layers().double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weights = {n: w for n, w in model.named_parameters() if w.dim() == 2}
    supports = {
        name: scattered(tuple(weight.shape), 12)
        if kind == "entry"
        else columns_of(tuple(weight.shape), [1, 5, 6, 7])
        for name, weight in weights.items()
    }
    model(x).square().sum().backward()
    wanted = torch.cat([supports[n].gather(w.grad) for n, w in weights.items()])
    model.zero_grad()
    torch.testing.assert_close(gradients(model, x, supports, mode), wanted)


def test_what_gelu_norms_and_products_made_is_not_held() -> None:
    x = torch.randn(3, 16, requires_grad=True)
    y = x * 2
    norm = nn.LayerNorm(16)
    for made, sources in (
        (F.gelu(y), [y]),
        (norm(y), [y]),
        (y * (z := y.exp()), [y, z]),
    ):
        saved = to_save(made, None)
        pointers = {one.data_ptr() for one in saved.tensors}
        assert made.data_ptr() not in pointers
        assert {one.data_ptr() for one in sources} <= pointers
        torch.testing.assert_close(saved.columns(*saved.tensors), made.detach())
        some = to_save(made, torch.arange(9))
        torch.testing.assert_close(some.columns(*some.tensors), made.detach()[:, :9])


def test_few_columns_are_copied_and_the_rest_let_go() -> None:
    x = torch.randn(3, 64, requires_grad=True) + 1
    saved = to_save(x, torch.tensor([3, 9]))
    (tensor,) = saved.tensors
    assert tensor.untyped_storage().nbytes() == 3 * 2 * 4
    assert torch.equal(saved.columns(tensor), x.detach()[:, [3, 9]])
    (whole,) = to_save(x, torch.arange(60)).tensors
    assert whole.data_ptr() == x.data_ptr()


def test_autocast_makes_inputs_again_in_the_layers_dtype() -> None:
    torch.manual_seed(0)
    model = Layers()
    x = torch.randn(4, 8)
    name, weight = "third.weight", model.third.weight
    support = scattered((16, 16), 30)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().square().sum()

    loss().backward()
    assert weight.grad is not None
    wanted = support.gather(weight.grad)
    model.zero_grad()
    parameters = attach(model, {name: support})
    loss().backward()
    torch.testing.assert_close(parameters.grad, wanted, rtol=3e-2, atol=3e-2)
