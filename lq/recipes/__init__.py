"""One runnable file per experiment: ``python -m lq.recipes.NAME --help``."""
