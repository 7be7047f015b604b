"""What a tuned language model answers, and what it has forgotten: scores.json of its run.

usage: python benchmarks/language_scores.py METHOD RECIPE FOLDER --unseen FILE [--answers 100]

METHOD is a baseline (lora, shira, full) whose weights are in the run FOLDER, `delta` for a run that
has written one, or `base` for the recipe's model as it is. Greedy answers of at most 48 tokens to
the first rows of the validation split become FOLDER/answers.jsonl, and the shares of right and of
ended ones `exact` and `ended`. An equation is right where its left side has the value of the
other's, any other answer where the text is the same. `unseen` is the loss a token on the rows of
FILE, which no run trains on. Nothing else is written: no copy of the weights.
"""

import argparse
import ast
import json
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from sift_cli.models.loading import LoadedModel
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs.session import Session

LONGEST = 48  # tokens of an answer
OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
NO_VALUE = (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError)


def value_of(equation: str) -> float | None:
    """The value of what stands before the first `=`; None where that is no arithmetic."""

    def value(node: ast.AST) -> float:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return float(number)
            case ast.BinOp(left, sign, right) if type(sign) in OPERATORS:
                return OPERATORS[type(sign)](value(left), value(right))
            case ast.UnaryOp(sign, one) if type(sign) in OPERATORS:
                return OPERATORS[type(sign)](value(one))
        raise ValueError(f"no arithmetic: {node}")

    try:
        found = value(ast.parse(equation.partition("=")[0].strip(), mode="eval").body)
    except NO_VALUE:
        return None
    return found if math.isfinite(found) else None


def right(said: str, expected: str) -> bool:
    """Whether an answer is the one expected: by its value where that is an equation."""
    wanted = value_of(expected) if "=" in expected else None
    if wanted is None:
        return said.strip() == expected.strip()
    found = value_of(said)
    return found is not None and math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9)


def trained(method: str, recipe: Recipe, folder: Path) -> LoadedModel:
    """The model as a run has left it."""
    from safetensors.torch import load_file

    from sift_cli.analysis.methods import adapt, adapted_layers, require_peft
    from sift_cli.models.loading import DTYPES, load_model, model_folder
    from sift_cli.runs.folder import TRAINED_FILE
    from sift_cli.runs.language import language_of
    from sift_cli.runs.summary import Summary
    from sift_cli.runs.tuned import load_tuned
    from sift_cli.selection.targets import choose_weights

    if method == "delta":
        return load_tuned(str(folder))[0]
    base, task = model_folder(recipe.model.path, recipe.model.revision), language_of(recipe)
    loaded = load_model(base, task.auto, task.configure(base), DTYPES[recipe.model.dtype])
    if method == "base":
        return loaded
    tensors, summary = load_file(folder / TRAINED_FILE), Summary.read(folder)
    assert summary is not None
    if method == "full":
        unknown = loaded.model.load_state_dict(tensors, strict=False).unexpected_keys
    else:
        chosen = recipe.selection
        sparse, _ = choose_weights(loaded.model, chosen.target, chosen.exclude, chosen.dense, ())
        layers = adapted_layers(loaded.model, sparse)
        # PEFT puts the adapter into the layers of the model that it is given
        wrapped = adapt(loaded.model, method, layers, (), summary.rank or 0, summary.seed)
        unknown = require_peft().set_peft_model_state_dict(wrapped, tensors).unexpected_keys
    assert not unknown, f"{folder}: the model has no {unknown}"
    return loaded


def answers(session: Session, count: int) -> list[dict[str, Any]]:
    """Greedy answers to the first rows, each beside the one expected."""
    from sift_cli.tasks.conversations import Conversation, row_of
    from sift_cli.tasks.generation import answer
    from sift_cli.tasks.language import Language

    task, found = session.task, []
    assert isinstance(task, Language)
    coder = task.coder(session.tokenizer)
    for line in task.evaluation[""]["value"][:count]:
        row = row_of(line)
        assert isinstance(row, Conversation)
        said, expected = (
            answer(session.model, coder, row, longest=LONGEST),
            row.messages[-1].content,
        )
        found.append(
            {
                "question": row.messages[-2].content,
                "expected": expected,
                "answer": said.text,
                "right": right(said.text, expected),
                "ended": said.ended,
            }
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Scores one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unseen", required=True)
    parser.add_argument("--answers", type=int, default=100)
    given = parser.parse_args(arguments)

    from study import SCORES

    from sift_cli.runs.session import open_session
    from sift_cli.runs.summary import Summary

    recipe = load_recipe(given.recipe)
    model = trained(given.method, recipe, given.folder)
    session = open_session(recipe, train=False, tuned=model)
    said = answers(session, given.answers)
    other = load_recipe(given.recipe, [f"data.path={given.unseen}", "data.max_length=1024"])
    unseen = open_session(other, train=False, split="train", tuned=model)
    scores = {
        "exact": mean(one["right"] for one in said),
        "ended": mean(one["ended"] for one in said),
        "unseen": unseen.evaluate()["loss"],
    }
    if given.method == "base":
        scores["loss"] = session.evaluate()["loss"]
    else:
        summary = Summary.read(given.folder)
        assert summary is not None
        scores |= {"peak": summary.peak_memory_bytes, "bytes": summary.delta_bytes}
    given.folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in said)
    (given.folder / "answers.jsonl").write_text(lines)
    (given.folder / SCORES).write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
