"""A package that AOTInductor compiles for this machine's CPU."""
