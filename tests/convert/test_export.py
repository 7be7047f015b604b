"""Deltas as PEFT adapters: loaded by PEFT itself, with the trained model's logits."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sift_cli.convert import export as exporting
from sift_cli.convert.adapter import choose_rank, shira_entries
from sift_cli.convert.export import export
from sift_cli.delta import load_delta
from sift_cli.errors import ExitCode, SiftError
from sift_cli.runs.tuned import load_tuned
from sift_cli.sparse import Support
from sift_cli.tasks.evaluation import probe
from sift_cli.tasks.kinds import task_of_config
from tests.support.command import Run, sift
from tests.support.models import save_base

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


def fresh(base: Path, dtype: str = "float32", seed: int = 9) -> PreTrainedModel:
    """The base as a user of PEFT loads it: with a head of random numbers."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=2, dtype=getattr(torch, dtype), pad_token_id=0
    )


def logits(model: nn.Module) -> torch.Tensor:
    return probe(task_of_config(model.config), model, model.config)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "deberta-v2", "llama"])
def test_peft_loads_the_adapter_with_the_trained_logits(
    architecture: str, run: Run, tmp_path: Path
) -> None:
    base = save_base(tmp_path / architecture, architecture)
    delta = run(f"model.path={base}", "train.learning_rate=0.1")
    report = export(delta, tmp_path / "adapter")
    assert report.logits_difference < 1e-5
    trained = load_tuned(str(delta))[0].model
    model = PeftModel.from_pretrained(fresh(base), str(tmp_path / "adapter"))
    wanted = logits(trained)
    assert not torch.allclose(logits(fresh(base)), wanted, atol=1e-2)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)
    assert report.compound == (["classifier"] if architecture == "roberta" else [])
    if report.compound:  # should PEFT learn it, the note can go
        with pytest.raises(AttributeError, match="RobertaClassificationHead"):
            model.merge_and_unload()
        return
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=0)
    state = trained.state_dict()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-6, rtol=0)


def test_the_inexact_entries_are_those_of_peft(run: Run, base: Path, tmp_path: Path) -> None:
    delta = run("train.learning_rate=0.1", "selection.density=0.3")
    report = export(delta, tmp_path / "adapter")
    model = PeftModel.from_pretrained(fresh(base), str(tmp_path / "adapter")).merge_and_unload()
    state, trained = model.state_dict(), load_tuned(str(delta))[0].model.state_dict()
    missed = [(state[name] - value).abs() for name, value in trained.items()]
    assert report.inexact.entries == sum(int((one > 0).sum()) for one in missed) > 0
    assert report.inexact.largest == max(float(one.max()) for one in missed)


def test_a_bfloat16_base_keeps_its_logits(run: Run, tmp_path: Path) -> None:
    base = save_base(tmp_path / "llama", "llama")
    delta = run(f"model.path={base}", "model.dtype=bfloat16", "train.learning_rate=0.1")
    export(delta, tmp_path / "adapter")
    model = PeftModel.from_pretrained(fresh(base, "bfloat16"), str(tmp_path / "adapter"))
    wanted = torch.tensor(load_delta(delta).header.logits)
    assert float((logits(model) - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())


def test_norms_whole_and_embeddings_only_when_asked(run: Run, base: Path, tmp_path: Path) -> None:
    delta = run("selection.target=all", "train.learning_rate=0.1")
    with pytest.raises(SiftError, match=r"does not hold 3 .*\n  bert.embeddings.pos") as caught:
        export(delta, tmp_path / "adapter")
    assert "--whole" in str(caught.value)
    assert "--partial" in str(caught.value)
    assert not list(tmp_path.glob("adapter*"))
    report = export(delta, tmp_path / "whole", whole=True)
    assert report.left_out == {}
    assert "bert.embeddings.word_embeddings" in report.whole
    wanted = torch.tensor(load_delta(delta).header.logits)
    model = PeftModel.from_pretrained(fresh(base), str(tmp_path / "whole"))
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)
    part = export(delta, tmp_path / "part", partial=True)
    assert len(part.left_out) == 3
    assert part.logits_difference > 1e-3
    model = PeftModel.from_pretrained(fresh(base), str(tmp_path / "part"))
    assert float((logits(model) - wanted).abs().max()) == pytest.approx(part.logits_difference)
    assert "another one" in (tmp_path / "part/README.md").read_text()


def test_transposed_layers_are_no_linear_layers(run: Run, tmp_path: Path) -> None:
    delta = run(f"model.path={save_base(tmp_path / 'gpt2', 'gpt2')}")
    with pytest.raises(SiftError, match=r"none of the delta's weights.*sift merge"):
        export(delta, tmp_path / "adapter")


def test_a_layer_too_dense_for_the_rank_of_the_others(run: Run, base: Path, tmp_path: Path) -> None:
    dense = "selection.density={default: 0.05, layer.0.output.dense: 1.0}"
    delta = run(dense)
    name = "bert.encoder.layer.0.output.dense"
    with pytest.raises(SiftError, match=f"{name}.weight: more changed entries"):
        export(delta, tmp_path / "adapter")
    report = export(delta, tmp_path / "adapter", whole=True)
    assert name in report.whole
    assert f"{name}.bias" not in report.biases
    model = PeftModel.from_pretrained(fresh(base), str(tmp_path / "adapter"))
    wanted = torch.tensor(load_delta(delta).header.logits)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)


def test_a_wrong_base_and_an_adapter_that_differs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = run()
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(SiftError, match="is not the base") as caught:
        export(delta, tmp_path / "adapter", base=str(other))
    assert caught.value.code == ExitCode.WRONG_FILE
    with pytest.raises(SiftError, match="is not the base") as caught:
        export(delta, tmp_path / "adapter", base=str(save_base(tmp_path / "llama", "llama")))
    assert caught.value.code == ExitCode.WRONG_FILE
    real = shira_entries
    monkeypatch.setattr(
        exporting, "shira_entries", lambda *args: (real(*args)[0], real(*args)[1] * 3)
    )
    with pytest.raises(SiftError, match="logits differ") as caught:
        export(delta, tmp_path / "adapter")
    assert caught.value.code == ExitCode.NOT_VERIFIED
    assert not list(tmp_path.glob("adapter*"))
    (tmp_path / "there").mkdir()
    with pytest.raises(SiftError, match="exists already"):
        export(delta, tmp_path / "there")


def test_without_peft_the_same_bytes_are_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = run()
    export(delta, tmp_path / "one")
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    assert export(delta, tmp_path / "other").logits_difference is None
    for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    config = json.loads((tmp_path / "one/adapter_config.json").read_text())
    assert config["peft_type"] == "SHIRA"
    assert config["base_model_name_or_path"] == load_delta(delta).header.base.path
    tensors = load_file(tmp_path / "one/adapter_model.safetensors")
    first = f"base_model.model.{config['target_modules'][0]}"
    assert tensors[f"{first}.shira_weight"].dtype == torch.float32
    assert tensors[f"{first}.shira_indices"].dtype == torch.int32


@st.composite
def supports(draw: st.DrawFn) -> Support:
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    positions = draw(st.sets(st.integers(0, shape[0] * shape[1] - 1), min_size=1))
    return Support.of(shape, torch.tensor(sorted(positions)))


@given(st.dictionaries(st.text("ab", min_size=1, max_size=3), supports(), max_size=4))
def test_the_rank_holds_as_many_layers_as_any(layers: dict[str, Support]) -> None:
    rank, fitting = choose_rank(layers)

    def holds(r: int, s: Support) -> bool:
        return len(s) <= r * sum(s.shape) <= s.size

    assert fitting == {name for name, s in layers.items() if holds(rank, s)}
    counts = {r: sum(holds(r, s) for s in layers.values()) for r in range(1, 145)}
    assert len(fitting) == max(counts.values())
    assert not fitting or rank == min(r for r, n in counts.items() if n == len(fitting))


@given(supports(), st.integers(0, 99))
def test_entries_are_filled_up_with_no_change(support: Support, seed: int) -> None:
    rank = -(-len(support) // sum(support.shape))
    if rank * sum(support.shape) > support.size:
        return
    torch.manual_seed(seed)
    base = torch.randn(support.shape, dtype=torch.float64).float()
    trained = base.clone()
    support.scatter_(trained, support.gather(base) + 1)
    indices, values = shira_entries(support, base, trained, rank)
    assert len(values) == rank * sum(support.shape) == len(set(map(tuple, indices.T.tolist())))
    dense = torch.zeros(support.shape)
    dense[indices[0].long(), indices[1].long()] = values
    assert torch.equal(dense, trained - base)


def test_what_export_prints(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = run()
    done = sift("export", delta.parent, "--to", "peft", "--out", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert "as SHiRA of r = 1" in done.stdout
    assert "biases replace the base model's own" in done.stdout
    assert "loaded with PEFT, logits differ by" in done.stdout
    done = sift("export", delta, "--out", tmp_path / "json", "--no-verify", "--json")
    report = json.loads(done.stdout)
    assert report["whole"] == ["classifier"]
    assert " ".join(report) == (
        "out base rank layers entries whole compound biases left_out inexact bytes "
        "logits_difference"
    )
    assert [*report["inexact"]] == ["entries", "largest"]
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    done = sift("export", delta, "--out", tmp_path / "without")
    assert "peft is not installed (pip install 'sift-cli[peft]')" in done.stdout
    done = sift("export", delta, "--out", tmp_path / "other", "--to", "onnx")
    assert done.returncode == 2
    assert done.stderr == "--to onnx: sift writes peft\n"
