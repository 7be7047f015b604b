"""Recipes: what they resolve to, and errors that say where."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from sift_cli.errors import ExitCode, SiftError
from sift_cli.recipe import Recipe, load_recipe, parse_recipe
from sift_cli.selection.policies import POLICIES
from sift_cli.system import shipped
from sift_cli.tasks.table import TASKS

HEAD = """\
model:
  path: somewhere
data:
  path: rows
  task: rte
"""  # what is added starts on line 6


def parse(added: str = "", *overrides: str) -> Recipe:
    return parse_recipe(HEAD + added, "r.yaml", overrides)


def errors(added: str = "", *overrides: str) -> list[str]:
    with pytest.raises(SiftError) as caught:
        parse(added, *overrides)
    assert caught.value.code == ExitCode.USAGE
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ("train:\n  epoch: 3\n", "7:3 train.epoch: unknown key; did you mean train.epochs?"),
        (
            "train:\n  densty: .1\n",
            "7:3 train.densty: unknown key; did you mean selection.density?",
        ),
        ("trian:\n  epochs: 3\n", "6:1 trian: unknown key; did you mean train?"),
        # a key of the same name elsewhere, and never one that would do nothing here
        (
            "selection:\n  warmup: .1\n",
            "7:3 selection.warmup: unknown key; did you mean train.warmup?",
        ),
        ("warmup_steps: 9\n", "6:1 warmup_steps: unknown key; did you mean train.warmup?"),
        (
            "selection:\n  schedule: after-warmup\n  warmupsteps: 9\n",
            "8:3 selection.warmupsteps: unknown key; did you mean selection.warmup_steps?",
        ),
        (
            "log: {xyzzy: 1}\n",
            "6:7 log.xyzzy: unknown key; known here: every, tensorboard, wandb, report",
        ),
    ],
)
def test_an_unknown_key_is_located_with_the_nearest_one(added: str, expected: str) -> None:
    assert errors(added) == [f"r.yaml:{expected}"]


def test_all_mistakes_come_at_once_one_line_each() -> None:
    added = "selection:\n  density: 2\ntrain:\n  epoch: 3\n  batch_size: none\n"
    assert errors(added) == [
        "r.yaml:7:3 selection.density: input should be less than or equal to 1, got 2",
        "r.yaml:10:3 train.batch_size: input should be a valid integer, got 'none'",
        "r.yaml:9:3 train.epoch: unknown key; did you mean train.epochs?",
    ]


def test_a_mistake_in_a_list_is_located_at_its_item() -> None:
    assert errors("selection:\n  dense:\n    - head\n    - [1]\n") == [
        "r.yaml:9:7 selection.dense[1]: input should be a valid string, got [1]"
    ]


def test_a_key_given_twice_is_an_error_at_the_second() -> None:
    assert errors("train:\n  epochs: 3\n  seed: 1\n  epochs: 4\n") == [
        "r.yaml:9:3 train.epochs: given twice"
    ]


def test_a_key_that_is_no_text_is_located() -> None:
    assert errors("train:\n  3: 4\n") == ["r.yaml:7:3 3: a key must be text"]


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (
            "train:\n  epochs: 3\n seed: 4\n",
            ":8:2 not valid YAML: expected <block end>, but found '<block mapping start>'",
        ),
        ("\tout: a\n", ":6:1 not valid YAML: found character '\\t' that cannot start any token"),
        ("out: *there\n", ":6:6 not valid YAML: found undefined alias 'there'"),
        ("out: 2024-13-45\n", ":6:6 not valid YAML: month must be in 1..12"),
        ("2024-13-45: a\n", ":6:1 not valid YAML: month must be in 1..12"),
        ("out: &a [*a]\n", ":6:6 not valid YAML: an alias inside what it stands for"),
        ("out: \x01\n", ":6:6 not valid YAML: a character that text has not"),
        (
            f"train: {{seed: &a 1}}\nout: [{'*a,' * 21}]",
            ":7:67 not valid YAML: more than 20 aliases",
        ),
    ],
)
def test_bad_yaml_is_located(added: str, expected: str) -> None:
    assert errors(added) == [f"r.yaml{expected}"]


def test_a_recipe_can_neither_nest_nor_multiply_nor_grow_without_end(tmp_path: Path) -> None:
    (nested,) = errors(f"out: {'[' * 5000}\n")
    assert re.fullmatch(r"r\.yaml:6:\d+ not valid YAML: nested too deeply", nested)
    tens = "x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"x{at}: &x{at} [{', '.join([f'*x{at - 1}'] * 10)}]\n" for at in range(1, 10)
    )
    assert errors(tens) == ["r.yaml:9:10 not valid YAML: more than 20 aliases"]
    assert "the value is not valid YAML" in errors("", "out=" + "[" * 5000)[0]
    large = tmp_path / "large.yaml"
    large.write_text("# " + "x" * (1 << 16))
    with pytest.raises(SiftError, match=r"larger than 65,536 bytes"):
        load_recipe(large)


def test_a_recipe_that_is_no_mapping_or_empty() -> None:
    with pytest.raises(SiftError, match=r"^r\.yaml:1:1 a recipe is a mapping with sections"):
        parse_recipe("- model\n", "r.yaml")
    with pytest.raises(SiftError, match=r"^r\.yaml:1:1 model: missing\nr\.yaml:1:1 data: missing$"):
        parse_recipe("", "r.yaml")


def test_a_missing_key_is_located_at_its_section_and_explained() -> None:
    with pytest.raises(SiftError) as caught:
        parse_recipe("data:\n  task: rte\n  path: x\nmodel:\n  dtype: float32\n", "r.yaml")
    expected = (
        "r.yaml:4:1 model.path: missing (hub id, local folder or GGUF file, or pkg:MODULE/PATH)"
    )
    assert str(caught.value) == expected


def test_an_empty_section_is_an_error_in_plain_words() -> None:
    assert errors("train:\n") == ["r.yaml:6:1 train: a section holds keys, got None"]


def test_numbers_must_be_finite() -> None:
    assert errors("train: {learning_rate: .inf, epochs: .nan}\n") == [
        "r.yaml:6:30 train.epochs: input should be a finite number, got nan",
        "r.yaml:6:9 train.learning_rate: input should be a finite number, got inf",
    ]


def test_load_recipe_names_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(SiftError, match=r"none\.yaml: no such recipe; `sift recipes ls` lists"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"out: \xff\xfe\n")
    with pytest.raises(SiftError, match=r"binary\.yaml: not a text file \(.* at byte 5\)"):
        load_recipe(tmp_path / "binary.yaml")


def test_load_recipe_reads_the_file_and_locates_mistakes_in_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(HEAD + "out: café\n", encoding="utf-8")
    assert load_recipe(path, ["train.seed=7"]).train.seed == 7
    assert load_recipe(path).out == "café"
    path.write_text(HEAD + "oot: x\n")
    with pytest.raises(SiftError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}:6:1 oot: unknown key; did you mean out?"


def test_an_override_wins_over_the_file() -> None:
    recipe = parse("train:\n  epochs: 3\n", "train.epochs=7", "eval.every=5", "data.task=sst2")
    assert (recipe.train.epochs, recipe.eval.every, recipe.data.task) == (7, 5, "sst2")


def test_the_last_override_of_a_key_wins_and_an_empty_one_is_null() -> None:
    recipe = parse("train: {max_steps: 9}\n", "train.seed=1", "train.seed=2", "train.max_steps=")
    assert (recipe.train.seed, recipe.train.max_steps) == (2, None)


def test_an_override_may_hold_a_list_and_an_equals_sign() -> None:
    recipe = parse("", "selection.exclude=[pooler, embeddings]", "out=a=b")
    assert recipe.selection.exclude == ["pooler", "embeddings"]
    assert recipe.out == "a=b"


def test_an_override_replaces_a_mistake_of_the_file() -> None:
    assert parse("train:\n  epochs: -3\n", "train.epochs=3").train.epochs == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epoch=3", "train.epoch: unknown key; did you mean train.epochs?"),
        ("trian.epochs=3", "trian: unknown key; did you mean train?"),
        ("train.epochs=-3", "train.epochs: input should be greater than 0, got -3"),
        ("data.metrics=[acuracy]", "data.metrics[0]: unknown: 'acuracy'; did you mean accuracy?"),
        ("train=3", "train: a section holds keys, got 3"),
        ("train.epochs", "an override reads section.key=value"),
        ("train..epochs=3", "an override reads section.key=value"),
        ("train.epochs=[1", "the value is not valid YAML"),
        ("out=2024-13-45", "the value is not valid YAML"),
    ],
)
def test_a_mistake_in_an_override_is_located_there(override: str, expected: str) -> None:
    assert errors("train:\n  seed: 3\n", override) == [f"--set {override}: {expected}"]


def test_a_mistake_in_an_overriding_list_is_not_located_in_the_file() -> None:
    override = "selection.dense=[[1]]"
    assert errors("selection:\n  dense:\n    - head\n", override) == [
        f"--set {override}: selection.dense[0]: input should be a valid string, got [1]"
    ]


def test_mistakes_of_file_and_overrides_come_together() -> None:
    assert errors("train:\n  epoch: 3\n", "train.seed=x", "oops") == [
        "--set oops: an override reads section.key=value",
        "--set train.seed=x: train.seed: input should be a valid integer, unable to parse string "
        "as an integer, got 'x'",
        "r.yaml:7:3 train.epoch: unknown key; did you mean train.epochs?",
    ]


def test_a_number_that_yaml_reads_as_text_is_a_number() -> None:
    assert parse("train:\n  learning_rate: 1e-3\n").train.learning_rate == 1e-3
    assert parse("", "train.learning_rate=5e-4").train.learning_rate == 5e-4


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_policy_fills_the_axes(policy: str) -> None:
    selection = parse("", f"selection.policy={policy}").selection
    row = POLICIES[policy]
    axes = (selection.score, selection.scope, selection.structure, selection.schedule)
    assert axes == (row.score, row.scope, row.structure, row.schedule)


def test_an_axis_that_is_given_overrides_the_policy() -> None:
    selection = parse("selection: {policy: random, score: magnitude, scope: global}\n").selection
    assert (selection.policy, selection.score, selection.scope) == ("random", "magnitude", "global")
    assert selection.schedule == POLICIES["random"].schedule


def test_the_default_policy_is_sign_descent_with_a_head_that_knows_something() -> None:
    recipe = parse()
    assert (recipe.selection.policy, recipe.selection.batches) == ("sign-descent", 128)
    assert (recipe.train.head_start, recipe.train.step_scale) == ("auto", "none")
    published = parse("selection: {policy: sift}\n")
    assert (published.selection.score, published.selection.batches) == ("gradient", 1)
    assert published.train.head_start == "random"


@pytest.mark.parametrize(
    ("given", "batches"),
    [
        ("score: snip", 1),  # what the row of another score looks at is not meant for it
        ("{policy: fisher, score: gradient}", 1),
        ("score: agreement", 8),  # a score that compares brings its own
        ("{policy: sift, score: sign-descent}", 128),
        ("{policy: fisher, scope: tensor}", 8),
        ("{score: snip, batches: 3}", 3),
        ("{density: 1.0}", 1),  # all are chosen, and one batch tells which have a gradient
    ],
)
def test_calibration_batches_go_with_the_score(given: str, batches: int) -> None:
    given = given if given.startswith("{") else f"{{{given}}}"
    assert parse(f"selection: {given}\n").selection.batches == batches


@pytest.mark.parametrize("policy", ["sign-descent", "lottery", "sift"])
def test_shares_by_pattern_are_of_each_weight(policy: str) -> None:
    density = "{policy: %s, density: {default: 0.01, query: 0.02}%s}\n"
    assert parse(f"selection: {density % (policy, '')}").selection.scope == "tensor"
    (line,) = errors(f"selection: {density % (policy, ', scope: global')}")
    assert "selection.density: under scope global all weights share one budget" in line


def test_a_descent_is_not_repeated_before_it_is_used() -> None:
    every = "schedule: every-n-steps, every"
    for given in ("schedule: every-batch", "schedule: every-n-steps", f"{every}: 127"):
        (line,) = errors(f"selection: {{{given}}}\n")
        assert "selection.schedule: a descent of 128 batches every" in line
    for given in (f"{every}: 128", "schedule: every-batch, score: gradient"):
        assert parse(f"selection: {{{given}}}\n").selection.schedule.startswith("every")


def test_density_is_one_percent_unless_given() -> None:
    assert parse().selection.density == 0.01
    assert parse("selection: {density: 0.2}\n").selection.density == 0.2


def test_a_budget_replaces_the_density() -> None:
    selection = parse("selection: {budget: 800000}\n").selection
    assert (selection.budget, selection.density) == (800_000, None)


def test_density_and_budget_exclude_each_other() -> None:
    assert errors("selection:\n  budget: 3\n  density: .1\n") == [
        "r.yaml:8:3 selection.density: give density or budget, not both"
    ]


@pytest.mark.parametrize("value", ["3", "{a: 1}", "[a, 3]", "null"])
def test_a_wrong_target_is_one_line(value: str) -> None:
    (line,) = errors(f"selection:\n  target: {value}\n")
    expected = "r.yaml:7:3 selection.target: give all-linear, all, or name patterns, got "
    assert line.startswith(expected)


@pytest.mark.parametrize("value", ["often", "-3", "0", "2.5", "[epoch]"])
def test_a_wrong_interval_is_one_line(value: str) -> None:
    (line,) = errors(f"eval:\n  every: {value}\n")
    assert line.startswith("r.yaml:7:3 eval.every: give epoch or a number of steps, got ")


def test_target_is_a_name_or_a_list_and_every_an_epoch_or_a_number() -> None:
    assert parse("selection: {target: all}\n").selection.target == "all"
    assert parse("selection: {target: [query, value]}\n").selection.target == ["query", "value"]
    assert parse("eval: {every: epoch}\n").eval.every == "epoch"
    assert parse("eval: {every: 50}\n").eval.every == 50


def test_one_name_stands_for_a_list_of_one() -> None:
    recipe = parse("selection: {exclude: pooler}\n", "data.text=sentence", "data.metrics=f1")
    assert recipe.selection.exclude == ["pooler"]
    assert recipe.data.text == ["sentence"]
    assert recipe.data.metrics == ["f1"]


@pytest.mark.parametrize("given", [(), ("data.text=a",), ("data.label=b",)])
def test_a_custom_task_needs_text_and_label(given: tuple[str, ...]) -> None:
    assert errors("", "data.task=custom", *given) == [
        "--set data.task=custom: data.task: custom needs data.text (one or two columns) and "
        "data.label"
    ]
    assert parse("", "data.task=custom", "data.text=[a, b]", "data.label=c").data.label == "c"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.task=ret", "data.task: unknown: 'ret'; did you mean rte?"),
        ("data.task=custm", "data.task: unknown: 'custm'; did you mean custom?"),
        ("selection.policy=magnitud", "selection.policy: unknown: 'magnitud'; did you mean magnit"),
        ("data.metrics=[f1, mathews]", "data.metrics[1]: unknown: 'mathews'; did you mean matth"),
        (
            "selection.policy=zzz",
            "selection.policy: unknown: 'zzz'; known: sift, current-batch, random, magnit",
        ),
    ],
)
def test_an_unknown_name_offers_the_nearest(override: str, expected: str) -> None:
    (line,) = errors("", override)
    assert line.startswith(f"--set {override}: {expected}")


@pytest.mark.parametrize("value", ["[]", "[a, b, c]"])
def test_one_or_two_text_columns(value: str) -> None:
    (line,) = errors("", f"data.text={value}")
    assert line.startswith(f"--set data.text={value}: data.text: ")
    assert "at least 1 item" in line or "at most 2 items" in line


@pytest.mark.parametrize(
    "added",
    [
        "",
        "selection: {budget: 1000, target: [query, 'layer.[0-5]'], exclude: pooler}\n",
        "selection: {policy: magnitude, scope: global, density: 1.0e-5}\nout: ähm\n",
        "train: {learning_rate: 1e-5, max_grad_norm: null, epochs: 2.5}\neval: {every: 10}\n",
    ],
)
def test_the_resolved_recipe_reads_back_as_itself(added: str) -> None:
    recipe = parse(added)
    text = recipe.to_yaml()
    again = parse_recipe(text, "resolved.yaml")
    assert again == recipe
    assert again.to_yaml() == text


def test_the_resolved_recipe_holds_every_value_in_the_order_of_the_schema() -> None:
    lines = parse("out: runs/ähm\n").to_yaml().splitlines()
    sections = [line.partition(":")[0] for line in lines if not line.startswith((" ", "-"))]
    assert sections == [
        *("model", "data", "selection", "train", "eval"),
        *("checkpoint", "distributed", "log", "out"),
    ]
    for resolved in (
        "out: runs/ähm",
        "  dtype: float32",
        "  score: sign-descent",
        "  density: 0.01",
        "  seed: 42",
    ):
        assert resolved in lines


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse().train.seed = 3


def test_importing_the_recipe_leaves_heavy_libraries_out() -> None:
    heavy = ("torch", "transformers", "datasets", "sklearn", "scipy", "numpy")
    program = f"import sys, sift_cli.recipe; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_glue_task_and_the_quickstart_ship() -> None:
    listed = shipped.listing()
    assert {"quickstart", *(f"glue/{task}" for task in TASKS)} <= set(listed)
    assert listed["glue/rte"] == "GLUE RTE: does one sentence follow from the other"
    assert all(about and not about.startswith("#") for about in listed.values())


@pytest.mark.parametrize("name", shipped.listing())
def test_every_shipped_recipe_validates(name: str) -> None:
    recipe = load_recipe(shipped.find(name, only_shipped=True))
    folder, _, task = name.rpartition("/")
    if folder == "glue":
        assert (recipe.data.path, recipe.data.task) == ("nyu-mll/glue", task)
    assert parse_recipe(recipe.to_yaml(), name) == recipe


@pytest.mark.parametrize("name", ["glue/rte", "glue/rte.yaml"])
def test_a_shipped_recipe_is_found_by_name(name: str) -> None:
    found = shipped.find(name, only_shipped=True)
    assert found == shipped.folder() / "glue" / "rte.yaml"
    assert shipped.find("glue/rte") == found


def test_a_path_that_exists_wins_over_a_shipped_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("mine")
    assert shipped.find("quickstart") == Path("quickstart")
    assert shipped.find("quickstart", only_shipped=True) == shipped.folder() / "quickstart.yaml"


def test_a_path_that_does_not_exist_is_left_to_the_reader_of_the_file() -> None:
    assert shipped.find("quickstart.yaml") == Path("quickstart.yaml")
    assert shipped.find("no/such") == Path("no/such")


def test_an_unknown_shipped_name_lists_those_there_are() -> None:
    with pytest.raises(SiftError, match=r"^no shipped recipe 'glue/ret'; there is glue/cola, "):
        shipped.find("glue/ret", only_shipped=True)


def test_an_installed_package_brings_its_recipes_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "sift_cli")
    assert shipped.folder() == tmp_path / "recipes"
    inside = tmp_path / "sift_cli" / "recipes"
    inside.mkdir(parents=True)
    (inside / "one.yaml").write_text("# About it\nmodel:\n")
    assert shipped.folder() == inside
    assert shipped.listing() == {"one": "About it"}


RESOLVED = parse_recipe(
    "model: {path: m}\ndata: {path: d, task: rte}\nselection: {density: 0.02}\n", "r"
).to_yaml()


def test_another_policy_for_a_resolved_recipe_brings_its_own_axes() -> None:
    recipe = parse_recipe(RESOLVED, "r", ["selection.policy=random"])
    assert recipe.selection.score == "random"
    both = ["selection.score=magnitude", "selection.policy=random"]
    for order in (both, both[::-1]):
        assert parse_recipe(RESOLVED, "r", order).selection.score == "magnitude"


def test_a_budget_replaces_a_density_and_the_other_way_round() -> None:
    recipe = parse_recipe(RESOLVED, "r", ["selection.budget=500"])
    assert (recipe.selection.budget, recipe.selection.density) == (500, None)
    again = parse_recipe(recipe.to_yaml(), "r", ["selection.density=0.5"])
    assert (again.selection.budget, again.selection.density) == (None, 0.5)
    with pytest.raises(SiftError, match="not both"):
        parse_recipe(RESOLVED, "r", ["selection.budget=500", "selection.density=0.5"])


def test_merge_keys_may_be_overridden_and_true_is_no_number() -> None:
    text = "a: &a {path: x}\nmodel: {<<: *a, path: m}\ndata: {path: d, task: rte}\n"
    with pytest.raises(SiftError) as caught:
        parse_recipe(text + "eval: {every: true}\n", "r")
    lines = sorted(str(caught.value).splitlines())
    assert len(lines) == 2
    assert lines[0].startswith("r:1:1 a: unknown key")
    assert lines[1].startswith("r:4:8 eval.every")


def test_a_policy_says_how_it_trains_unless_the_recipe_does() -> None:
    def trained(text: str, *changes: str) -> tuple[str, str]:
        train = parse_recipe(text, "r", changes).train
        return train.step_scale, train.head_start

    scaled = HEAD + "selection: {policy: scaled-sift}\n"
    assert trained(HEAD + "selection: {policy: sift}\n") == ("none", "random")
    assert trained(scaled) == ("input", "auto")
    assert trained(scaled + "train: {head_start: random}\n") == ("input", "random")
    assert trained(scaled, "train.step_scale=none") == ("none", "auto")


def test_another_policy_for_a_resolved_recipe_trains_in_its_own_way() -> None:
    there, back = "selection.policy=scaled-sift", "selection.policy=random"
    scaled = parse_recipe(RESOLVED, "r", [there])
    assert (scaled.train.step_scale, scaled.train.head_start) == ("input", "auto")
    random = parse_recipe(scaled.to_yaml(), "r", [back])
    assert (random.train.step_scale, random.train.head_start) == ("none", "random")
    for order in ([back, "train.step_scale=input"], ["train.step_scale=input", back]):
        assert parse_recipe(scaled.to_yaml(), "r", order).train.step_scale == "input"
    own = parse_recipe(HEAD + "train: {step_scale: input}\n", "r", [back])
    assert own.train.step_scale == "input"  # no policy said so: the recipe did


def test_a_rate_may_be_left_open() -> None:
    def rate(text: str) -> object:
        return parse_recipe(HEAD + text, "r").train.learning_rate

    assert rate("") is None
    assert rate("train: {learning_rate: null}\n") is None
    assert rate("train: {learning_rate: 3e-4}\n") == 3e-4
    assert rate("train: {learning_rate: auto}\n") == "auto"


OF_TOKENS = ("data.task=instruct", "data.max_length=128")


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("packing: true", "train.packing: give train.tokens too, which says how many make a step"),
        (
            "packing: false\n  tokens: 4096",
            "train.tokens: it is the size of a step of packed rows; without packing give "
            "batch_size and accumulate",
        ),
        (
            "tokens: 4096\n  batch_size: 8",
            "train.batch_size: train.tokens says what makes a step; give one of the two",
        ),
        (
            "tokens: 4096\n  accumulate: 2",
            "train.accumulate: train.tokens says what makes a step; give one of the two",
        ),
        (
            "tokens: 100",
            "train.tokens: a step of 100 tokens holds no row of data.max_length 128; give as many "
            "or more",
        ),
        ("chunk_loss: 0", "train.chunk_loss: give auto, off or a number of tokens, got 0"),
        ("chunk_loss: true", "train.chunk_loss: give auto, off or a number of tokens, got True"),
        ("chunk_loss: on", "train.chunk_loss: give auto, off or a number of tokens, got True"),
    ],
)
def test_steps_of_tokens_and_of_rows_do_not_mix(train: str, expected: str) -> None:
    (line,) = errors(f"train:\n  {train}\n", *OF_TOKENS)
    where, _, said = line.partition(" ")
    assert said == expected
    key = expected.partition(":")[0].removeprefix("train.")
    at = train.splitlines().index(next(one for one in train.splitlines() if key in one))
    assert where == f"r.yaml:{7 + at}:3"


@pytest.mark.parametrize(("given", "read"), [("off", "off"), ("auto", "auto"), ("512", 512)])
def test_chunk_loss_as_yaml_reads_it(given: str, read: object) -> None:
    """YAML takes `off` for false."""
    recipe = parse(f"train: {{chunk_loss: {given}}}\n", *OF_TOKENS)
    assert recipe.train.chunk_loss == read
    assert parse_recipe(recipe.to_yaml(), "again.yaml") == recipe


def test_packing_is_on_where_tokens_are_given_and_a_resolved_recipe_reads_the_same() -> None:
    assert not parse().train.packs
    assert (parse().train.tokens, parse().train.packing) == (None, None)
    for given in ("tokens: 4096", "tokens: 4096, packing: true"):
        recipe = parse(f"train: {{{given}}}\n", *OF_TOKENS)
        assert recipe.train.packs
        assert parse_recipe(recipe.to_yaml(), "again.yaml") == recipe


@pytest.mark.parametrize("given", ["tokens: 4096", "chunk_loss: 512", "chunk_loss: off"])
def test_keys_of_tokens_belong_to_language_tasks(given: str) -> None:
    key = given.partition(":")[0]
    assert errors(f"train:\n  {given}\n") == [
        f"r.yaml:7:3 train.{key}: it belongs to task: instruct or text, and would do nothing here"
    ]
    assert parse("train: {packing: false}\n").train.packing is False


@pytest.mark.parametrize("task", ["tags", "text"])
def test_keys_of_classes_belong_to_rows_with_a_label_each(task: str) -> None:
    said = "train.{}: it belongs to rows with a label each, and would do nothing here"
    for given in ("class_weights: balanced", "label_smoothing: 0.1"):
        (error,) = errors(f"train:\n  {given}\n", f"data.task={task}")
        assert error.endswith(said.format(given.partition(":")[0]))
    (error,) = errors("train:\n  label_smooth: 0.1\n", f"data.task={task}")
    assert "did you mean train.label_smoothing" not in error


# Rows for language models

LANGUAGE_HEAD = HEAD.replace("task: rte", "task: {task}")


def language(task: str, added: str = "", *overrides: str) -> Recipe:
    text = LANGUAGE_HEAD.format(task=task) + added  # keys of `data` are added from line 6 on
    return parse_recipe(text, "r.yaml", overrides)


def language_errors(task: str, added: str) -> list[str]:
    with pytest.raises(SiftError) as caught:
        language(task, added)
    return str(caught.value).splitlines()


def test_keys_of_rows_have_the_defaults_of_their_task() -> None:
    data = language("instruct").data
    assert (data.format, data.columns, data.template) == ("auto", {}, "model")
    assert (data.system, data.train_on, data.too_long) == (None, "all-answers", "drop")
    assert data.max_length == 1024
    text = language("text").data
    assert (text.format, text.too_long, text.max_length) == ("auto", "split", 1024)
    assert (text.template, text.train_on) == (None, None)
    labelled = parse().data
    assert labelled.max_length == 128
    keys = ("format", "columns", "template", "system", "train_on", "too_long")
    assert {getattr(labelled, key) for key in keys} == {None}
    for task in ("instruct", "text"):
        again = language(task, "  max_length: 99\n")
        assert again.data.max_length == 99
        assert parse_recipe(again.to_yaml(), "again") == again


@pytest.mark.parametrize(
    ("task", "added", "expected"),
    [
        (
            "rte",
            "  template: chatml\n",
            "6:3 data.template: it belongs to task: instruct, and would do nothing here",
        ),
        (
            "custom",
            "  text: a\n  label: b\n  columns: {text: c}\n",
            "8:3 data.columns: it belongs to task: instruct or text, and would do nothing here",
        ),
        (
            "text",
            "  system: Be kind.\n",
            "6:3 data.system: it belongs to task: instruct, and would do nothing here",
        ),
        (
            "text",
            "  train_on: last-answer\n",
            "6:3 data.train_on: it belongs to task: instruct, and would do nothing here",
        ),
        (
            "instruct",
            "  label: mark\n",
            "6:3 data.label: rows of task: instruct have no labels; what their columns are called "
            "is said by data.columns",
        ),
        (
            "instruct",
            "  format: text\n",
            "6:3 data.format: rows of text are for task: text, not instruct",
        ),
        (
            "text",
            "  format: alpaca\n",
            "6:3 data.format: rows of alpaca are for task: instruct, not text",
        ),
        (
            "instruct",
            "  too_long: split\n",
            "6:3 data.too_long: an answer is not split from its question; only texts are",
        ),
        (
            "instruct",
            "  format: alpacca\n",
            "6:3 data.format: unknown: 'alpacca'; did you mean alpaca?",
        ),
        (
            "instruct",
            "  columns: {instructon: question}\n",
            "6:3 data.columns: no format has the name 'instructon'; did you mean instruction?",
        ),
        (
            "instruct",
            "  columns: {instruction: [a, b]}\n",
            "6:3 data.columns: instruction: input should be a valid string, got ['a', 'b']",
        ),
    ],
)
def test_keys_of_rows_that_do_nothing_or_make_no_sense(
    task: str, added: str, expected: str
) -> None:
    assert language_errors(task, added) == [f"r.yaml:{expected}"]


def test_another_task_takes_away_what_a_resolved_recipe_holds_of_the_old_one() -> None:
    text = language("instruct").to_yaml()
    assert parse_recipe(text, "r", ["data.task=text"]).data.too_long == "split"
    changes = ["data.task=custom", "data.text=a", "data.label=b", "data.columns="]
    assert parse_recipe(text, "r", changes).data.template is None


def test_an_editable_recipe_shows_only_keys_that_its_task_has() -> None:
    from sift_cli.cli.editing import editable

    text = editable(LANGUAGE_HEAD.format(task="text"))
    assert "# too_long: split" in text
    assert "# train_on" not in text
    assert "# train_on: all-answers" in editable(LANGUAGE_HEAD.format(task="instruct"))
    assert "too_long" not in editable(HEAD)
