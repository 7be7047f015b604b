"""The recipes that come with sift."""

from pathlib import Path

from sift_cli.errors import SiftError

PACKAGE = Path(__file__).parent.parent


def folder() -> Path:
    """Where they lie: inside an installed package, beside it in a source checkout."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def listing() -> dict[str, str]:
    """Name (such as glue/rte) -> the comment on its first line."""
    found = {}
    for path in sorted(folder().rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[path.relative_to(folder()).with_suffix("").as_posix()] = first.lstrip("# ")
    return found


def find(recipe: str, only_shipped: bool = False) -> Path:
    """The file behind a path or the name of a shipped recipe; a path that exists wins."""
    path = Path(recipe)
    if path.is_file() and not only_shipped:
        return path
    named = folder() / f"{recipe.removesuffix('.yaml')}.yaml"
    if named.is_file() and (only_shipped or path.suffix != ".yaml"):
        return named
    if only_shipped:
        raise SiftError(f"no shipped recipe {recipe!r}; there is {', '.join(listing())}")
    return path
