"""Random networks against lq: every public step compared with what eager PyTorch computes."""
