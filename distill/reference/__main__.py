"""`python -m distill.reference`: rewrite recipes/recipe.schema.json and the generated parts of pages."""

import sys

from distill.errors import UserError
from distill.reference.pages import stale, written
from distill.shipped import shipped_folder


def main() -> int:
    """Rewrite the files that are out of date and print their names. Only a clone of the sources has the pages."""
    root = shipped_folder().parent
    try:
        if not (root / "docs").is_dir():
            raise UserError(f"{root} has no docs/: only a clone of the sources has pages to write")
        texts = written(root)
        for path in stale(texts):
            path.write_text(texts[path], encoding="utf-8")
            print(f"written: {path.relative_to(root)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
