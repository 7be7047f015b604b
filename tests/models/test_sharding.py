"""Models in rows over ranks: what each reads and holds, and that it is the model of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.causal import save_causal
from tests.support.forks import on_ranks
from tests.support.sharded import load_of_rank

KINDS = ("llama-tied", "gpt2", "gemma3")  # tied; Conv1D and saved buffers; scaled embeddings
RANKS = 2


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank tells of each kind of model."""
    folder = tmp_path_factory.mktemp("bases")
    bases = [save_causal(folder / kind, kind) for kind in KINDS]
    by_rank = on_ranks(RANKS, folder, load_of_rank, bases)
    return {kind: [one[at] for one in by_rank] for at, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_model_of_one_process(kind: str, loaded: dict[str, list[dict[str, Any]]]) -> None:
    for one in loaded[kind]:
        assert one["tensors"] == one["of one process"]
        torch.testing.assert_close(one["logits"], one["logits of one process"])


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_reads_its_own_rows_alone(
    kind: str, loaded: dict[str, list[dict[str, Any]]]
) -> None:
    whole = loaded[kind][0]["bytes in files"]
    read = [one["bytes read"] for one in loaded[kind]]
    assert sum(read) == whole
    assert max(read) < 0.6 * whole
    assert max(one["bytes held"] for one in loaded[kind]) < 0.6 * whole


def test_what_the_files_do_not_fill_is_refused(tmp_path: Path) -> None:
    base = save_causal(tmp_path / "base", "llama-tied")
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(
        text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    (told,) = on_ranks(1, tmp_path, load_of_rank, [base])
    assert told[0]["refused"].startswith(f"{base} does not fill the model LlamaForCausalLM")
