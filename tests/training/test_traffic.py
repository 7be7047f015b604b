"""What a step sends where the model lies in rows, as torch's collectives see it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.causal import chats_recipe
from tests.support.forks import on_ranks
from tests.support.sharded import sent_of_rank

RANKS, FP32 = 2, 4  # bytes of a number
SETTINGS = {
    "few": ["selection.density=0.01"],
    "many": ["selection.density=0.3"],
    "with dense": ["selection.dense=[norm, layernorm, embed_tokens]"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats_recipe(tmp_path_factory.mktemp("sent"), "llama-tied")


@pytest.fixture(scope="module")
def sent(recipe: Path) -> list[dict[str, dict[str, Any]]]:
    """What each rank sends in a step under each of SETTINGS."""
    return on_ranks(RANKS, recipe.parent, sent_of_rank, recipe, SETTINGS)


@pytest.fixture(scope="module")
def weights(recipe: Path) -> Mapping[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(recipe.parent / "base")
    return dict(model.named_parameters())


def rows_of(weight: Tensor) -> int:
    """The rows of a weight on each rank, those included that fill up the last one's."""
    return ceil(len(weight) / RANKS)


def nbytes(weights: Iterable[Tensor]) -> int:
    """Bytes of what a rank has of them."""
    return sum(FP32 * rows_of(weight) * prod(weight.shape[1:]) for weight in weights)


def at_once(names: Iterable[str]) -> list[list[str]]:
    """The names by what is gathered at once: each block, and all that is in none."""
    of: dict[str, list[str]] = {}
    for name in names:
        of.setdefault(name[:15] if ".layers." in name else "", []).append(name)
    return list(of.values())


def most_owned(supports: Mapping[str, Tensor | None], weights: Mapping[str, Tensor]) -> int:
    """The entries of the rank that has the most of them, of supports that are not whole."""
    owned: Counter[int] = Counter()
    for name, positions in supports.items():
        for at in [] if positions is None else positions.tolist():
            owned[at // prod(weights[name].shape[1:]) // rows_of(weights[name])] += 1
    return max(owned.values())


def test_density_changes_nothing_of_what_is_gathered(sent: list[dict[str, dict[str, Any]]]) -> None:
    for one in sent:
        few, many = (
            [call for call in one[name]["sent"] if "gather" in call[0]] for name in ("few", "many")
        )
        assert few == many != []
        counts = [sum(map(len, one[name]["supports"].values())) for name in ("few", "many")]
        assert counts[1] > 20 * counts[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_gathers_twice_and_exchanges_its_entries_once(
    name: str, sent: list[dict[str, dict[str, Any]]], weights: Mapping[str, Tensor]
) -> None:
    for one in sent:
        supports = one[name]["supports"]
        gathered = [nbytes(weights[key] for key in group) for group in at_once(weights)]
        whole = [key for key, positions in supports.items() if positions is None]
        summed = [RANKS * nbytes(weights[key] for key in group) for group in at_once(whole)]
        summed.append(RANKS * most_owned(supports, weights) * FP32)
        assert Counter(one[name]["sent"]) == Counter(
            [
                *(("allgather_base", size) for size in 2 * gathered),  # forward and backward
                *(("reduce_scatter_base", size) for size in summed),
                ("allreduce", 3 * FP32),  # loss, stop, save
                ("allreduce", FP32),  # of the norm
            ]
        )
