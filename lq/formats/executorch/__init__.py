"""ExecuTorch programs: ``.pte`` files for phones and boards, whose INT8 kernels are XNNPACK's."""
