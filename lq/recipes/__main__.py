"""``lq-recipe NAME``, or ``python -m lq.recipes NAME``: runs a recipe; without a name, lists them."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path


def recipes() -> dict[str, str]:
    """The first line of each recipe's docstring, by name."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0] for path in files}


def main() -> int | str:
    """Run the recipe that the first argument names, as ``python -m lq.recipes.NAME`` does.

    Returns:
        What to exit with: 0, or a message for standard error.
    """
    known = recipes()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, known))
        print("lq-recipe NAME [KEY=VALUE ...]; lq-recipe NAME --help prints its keys\n")
        print("\n".join(f"{recipe:<{width}}  {line}" for recipe, line in known.items()))
        return 0
    if name not in known:
        return f"recipe {name!r} is unknown; choose one of {', '.join(known)}"
    del sys.argv[1]
    # As the main module under its own name, which child processes import again.
    runpy.run_module(f"lq.recipes.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
