# A command, not tests: doctests would import it, which takes timm, and timm is no requirement of the tests.
collect_ignore_glob = ["*.py"]
