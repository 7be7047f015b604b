"""How rows became tokens travels with what was tuned: template, system prompt, stop tokens, day."""

import json
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import chat_template_utils

from sift_cli.convert.difference import difference
from sift_cli.convert.merge import merge
from sift_cli.convert.undo import read_record, side_files
from sift_cli.delta.file import load_delta, save_delta
from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe
from sift_cli.runs.tuned import load_tuned, task_of_loaded
from sift_cli.tasks import templates
from sift_cli.tasks.coder import Coded
from sift_cli.tasks.conversations import Conversation, Message
from sift_cli.tasks.language import Language, Wording
from sift_cli.tasks.supervision import code, prompt_ids
from sift_cli.training import train
from tests.support.chats import CHATML, END, START, save_chat_model
from tests.support.command import sift

# As ChatML, but for what stands at a turn's beginning: no other template here makes such tokens.
OWN = CHATML.replace("message['role'] + '\\n'", "message['role'] + ' says:'").replace(
    "assistant\\n", "assistant says:"
)
TODAY = "{{ strftime_now('%d %b %Y') }}" + CHATML
SYSTEM = "Be short."
ASKED = "what is 1 and 2?"


@dataclass
class Tuned:
    """A run with a template of its own, whose file is gone, and what it started from."""

    base: Path
    run: Path
    recipe: Path
    metrics: dict[str, float | None]

    @property
    def delta(self) -> Path:
        return self.run / "delta.safetensors"


def prepared(folder: Path, template: str, base_template: str | None = CHATML) -> Path:
    """A recipe with `template` beside a base that has another one."""
    assert template != base_template
    torch.manual_seed(0)
    base = save_chat_model(folder / "base", base_template)
    config = AutoConfig.from_pretrained(base)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    (base / "generation_config.json").unlink()
    data = folder / "chats"
    data.mkdir()
    lines = [
        json.dumps({"instruction": f"what is {at} and {at + 1}?", "output": f"{2 * at + 1}"})
        for at in range(12)
    ]
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "own.jinja").write_text(template)
    recipe = folder / "chat.yaml"
    recipe.write_text(
        f"model: {{path: {base}}}\n"
        f"data: {{path: {data}, task: instruct, system: {SYSTEM}, "
        f"template: {folder / 'own.jinja'}}}\n"
        "selection: {density: 0.2}\n"
        "train: {max_steps: 3, batch_size: 4, learning_rate: 1.0e-2, seed: 3}\n"
        "log: {report: false}\n"
    )
    return recipe


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("worded")
    recipe = prepared(folder, OWN)
    found = train(load_recipe(recipe), folder / "run")
    (folder / "own.jinja").unlink()
    return Tuned(folder / "base", folder / "run", recipe, dict(found.metrics))


@pytest.fixture(scope="module")
def merged(tuned: Tuned) -> Path:
    out = tuned.base.parent / "merged"
    merge([tuned.delta], out)
    return out


def plainly(folder: Path, template: str) -> str:
    """What transformers alone answers with a model folder and a template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASKED}]
    given = tokenizer.apply_chat_template(
        chat, chat_template=template, add_generation_prompt=True, return_tensors="pt"
    )
    found = model.generate(**given, do_sample=False, max_new_tokens=12)
    return str(tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_run_a_delta_and_a_merged_folder_are_asked_as_they_were_trained(
    tuned: Tuned, merged: Path
) -> None:
    wanted = plainly(merged, OWN)
    assert wanted != plainly(merged, CHATML)
    for place in (tuned.run, tuned.delta, merged):
        for command in (("predict", place, ASKED), ("chat", place, "--once", ASKED)):
            done = sift(*command, "--json", "--max-new-tokens", 12)
            values = json.loads(done.stdout)
            assert values.get("predictions", [values])[0]["answer"] == wanted, command


def test_a_run_is_scored_as_it_was_trained(tuned: Tuned, merged: Path) -> None:
    for place in (tuned.run, tuned.delta, merged):
        metrics = json.loads(sift("eval", place, "--json").stdout)["metrics"]
        assert metrics == tuned.metrics


def test_a_template_given_as_a_file_travels_by_its_text(tuned: Tuned, merged: Path) -> None:
    header = load_delta(tuned.delta).header
    assert header.language is not None
    assert header.recipe is not None
    assert header.language["template"] == header.recipe["data"]["template"] == OWN
    assert header.language["system"] == SYSTEM
    for folder in (tuned.run, merged):
        assert load_recipe(folder / "recipe.yaml").data.template == OWN
    loaded, recipe = load_tuned(str(merged))
    stated = {key: value for key, value in header.language.items() if key != "stops"}
    assert task_of_loaded(loaded, recipe).header()["language"] == stated


def test_a_changed_template_is_written_not_copied(merged: Path) -> None:
    # rule 3.9
    assert (merged / "chat_template.jinja").read_text() == OWN
    assert AutoTokenizer.from_pretrained(merged).get_chat_template() == OWN


@pytest.mark.parametrize("where", ["jinja", "config", "nowhere"])
def test_undo_gives_the_bases_own_files_back(tuned: Tuned, tmp_path: Path, where: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tuned.base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    text = (base / "chat_template.jinja").read_text()
    if where != "jinja":
        (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings
    if where == "config":
        settings["chat_template"] = text
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
    out, back = tmp_path / "merged", tmp_path / "back"
    merge([tuned.delta], out, base=str(base))
    assert AutoTokenizer.from_pretrained(out).get_chat_template() == OWN
    again = json.loads((out / "tokenizer_config.json").read_text())
    assert again.get("chat_template") == (OWN if where == "config" else None)
    merge([tuned.delta], back, base=str(out), undo=True)
    for file in ("generation_config.json", *map(str, [*side_files(base), *side_files(back)])):
        assert (base / file).exists() == (back / file).exists(), file
        if (base / file).exists():
            assert (base / file).read_bytes() == (back / file).read_bytes(), file


def test_a_merged_folder_names_the_tokens_that_end_an_answer(tuned: Tuned, merged: Path) -> None:
    # rule 3.9: whoever generates must stop where sift does, whatever the base has left open
    assert not (tuned.base / "generation_config.json").exists()
    (stop,) = {AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids(END)}
    assert GenerationConfig.from_pretrained(merged).eos_token_id == stop


def test_a_shipped_template_is_written_as_the_model_needs_it(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "base", None, begins=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = Language("instruct", wording=Wording("alpaca"))
    asked = prompt_ids(task.coder(tokenizer), Conversation((Message("user", "a"),)))
    texts = task.side_texts(folder)
    assert set(texts) == {"chat_template.jinja", "generation_config.json"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    chat = [{"role": "user", "content": "a"}]
    again = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True
    )
    assert again["input_ids"] == asked
    assert asked.count(tokenizer.bos_token_id) == 1  # rule 3.1


def test_generation_settings_that_name_them_are_copied(tuned: Tuned, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tuned.base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    stop = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(END)
    text = json.dumps({"eos_token_id": [stop], "temperature": 0.2, "do_sample": True})
    (base / "generation_config.json").write_text(text)
    merge([tuned.delta], tmp_path / "merged", base=str(base))
    assert (tmp_path / "merged/generation_config.json").read_text() == text
    (base / "generation_config.json").write_text('{"top_k": 5}')
    merge([tuned.delta], tmp_path / "other", base=str(base))
    named = json.loads((tmp_path / "other/generation_config.json").read_text())
    assert named == {"top_k": 5, "eos_token_id": stop}
    record = read_record(tmp_path / "other")
    assert record is not None
    assert record.texts["generation_config.json"] == '{"top_k": 5}'


def test_a_run_goes_on_without_the_file_but_not_with_another(tuned: Tuned, tmp_path: Path) -> None:
    recipe = prepared(tmp_path, OWN)
    run = tmp_path / "run"
    train(load_recipe(recipe), run)
    (tmp_path / "own.jinja").unlink()
    own = run / "recipe.yaml"
    again = sift("train", own, "--out", run, "--resume", "--json", "-q")
    assert json.loads(again.stdout)["delta_sha256"] == sha256_of(run / "delta.safetensors")
    (tmp_path / "own.jinja").write_text(OWN + "{# another #}")
    done = sift("train", recipe, "--out", run, "--resume")
    assert done.returncode == 2
    assert f"data.template: it was a text of {len(OWN):,} letters" in done.stderr


def sha256_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_tokens_do_not_depend_on_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_chat_model(tmp_path / "base", TODAY)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    coder = Language("instruct").coder(tokenizer)
    row = Conversation((Message("user", "a"), Message("assistant", "b")))

    def coded() -> list[int]:
        (one,) = code(coder, [row])
        assert isinstance(one, Coded)
        return one.ids

    before = coded()
    assert coder.word(before).startswith("26 Jul 2024")
    assert coder.word(prompt_ids(coder, row)).startswith("26 Jul 2024")

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Later":
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)[
        :11
    ] == ("02 Jan 2031")
    assert coded() == before


def test_a_difference_carries_the_tuned_models_own_template(
    tuned: Tuned, merged: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in merged.iterdir():
        if file.is_file() and file.name != "recipe.yaml":
            (elsewhere / file.name).write_bytes(file.read_bytes())
    for at, (folder, system) in enumerate([(merged, SYSTEM), (elsewhere, None)]):
        out = tmp_path / f"{at}.safetensors"
        difference(str(tuned.base), str(folder), out)
        language = load_delta(out).header.language
        assert language is not None
        assert (language["template"], language["system"]) == (OWN, system)


def test_deltas_that_were_worded_apart_name_no_template(tuned: Tuned, tmp_path: Path) -> None:
    delta = load_delta(tuned.delta)
    assert delta.header.language is not None
    other = {**delta.header.language, "system": None}
    header = delta.header.model_copy(update={"language": other})
    save_delta(tmp_path / "other.safetensors", replace(delta, header=header))
    both = [tuned.delta, tmp_path / "other.safetensors"]
    with pytest.raises(SiftError, match="different chat templates or system prompts"):
        merge(both, tmp_path / "refused", verify=False)
    merge(both, tmp_path / "merged", head=both[0], verify=False)
    assert (tmp_path / "merged/chat_template.jinja").read_text() == OWN


def test_a_template_in_full_is_checked_as_a_file_is(tuned: Tuned) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tuned.base)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    for text, said in (
        ("{% for one in messages %}\n{{ one.content }", "line 2: no Jinja template"),
        ("{{ '<|nowhere|>' }}", r"the one in the recipe needs the token <\|nowhere\|>"),
    ):
        with pytest.raises(SiftError, match=f"data.template: {said}"):
            templates.choose_template(text, tokenizer)


def test_a_template_that_shows_nothing(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(START)
    with pytest.raises(SiftError, match=r"own\.jinja: no Jinja template: it shows nothing"):
        templates.template_text(str(file))


def test_shipped_templates_never_change_under_their_names() -> None:
    # recipes and deltas carry the name alone; what it stands for must stay
    found = {
        name: sha256_of(templates.SHIPPED / f"{name}.jinja")[:12] for name in templates.BUILTIN
    }
    assert found == {"alpaca": "177a0150a859", "chatml": "e69e2cb4998f"}
