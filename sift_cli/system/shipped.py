"""The recipes that come with sift."""

from pathlib import Path

from sift_cli.errors import SiftError

PACKAGE = Path(__file__).parent.parent


def folder() -> Path:
    """The folder of recipes: inside an installed package, beside it in a source checkout."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def listing() -> dict[str, str]:
    """The comment on the first line of each recipe, by its name (such as glue/rte)."""
    recipes = {}
    for path in sorted(folder().rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        recipes[path.relative_to(folder()).with_suffix("").as_posix()] = first.lstrip("# ")
    return recipes


def find(recipe: str, only_shipped: bool = False) -> Path:
    """The file of a recipe: the path `recipe` where it exists, else the shipped one of that name.

    `only_shipped` takes no path, and raises SiftError for an unknown name.
    """
    path = Path(recipe)
    if path.is_file() and not only_shipped:
        return path
    named = folder() / f"{recipe.removesuffix('.yaml')}.yaml"
    if named.is_file() and (only_shipped or path.suffix != ".yaml"):
        return named
    if only_shipped:
        raise SiftError(f"no shipped recipe {recipe!r}; there is {', '.join(listing())}")
    return path
