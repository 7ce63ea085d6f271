"""The program: an archive of torch.export that PyTorch reads."""
