"""Builds the site from docs/ into build/site, without network; a broken link stops it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS, COPY, SITE = ROOT / "docs", ROOT / "build/docs", ROOT / "build/site"


def main() -> None:
    """Copies the pages, builds, and says where the site is."""
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(DOCS, COPY)
    for page in COPY.rglob("*.md"):
        original = DOCS / page.relative_to(COPY)
        page.write_text(inside(original.read_text(encoding="utf-8"), original), encoding="utf-8")
    builder = Path(sys.executable).parent / "zensical"
    done = subprocess.run([builder, "build", "--strict", "--clean"], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    print(SITE / "index.html")


def inside(text: str, page: Path) -> str:
    """The page's text; links to files of the project that are no part of the site become names."""

    def name(link: re.Match[str]) -> str:
        target = (page.parent / link[2].partition("#")[0]).resolve()
        if "://" in link[2] or link[2].startswith("#") or target.is_relative_to(DOCS):
            return link[0]
        return f"`{target.relative_to(ROOT)}`"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", name, text)


if __name__ == "__main__":
    main()
