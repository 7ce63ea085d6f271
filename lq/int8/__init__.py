"""The INT8 network in process: the module, and its oneDNN kernels."""
