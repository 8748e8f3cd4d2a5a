"""What is trained: models, text, FLOPs and the reference run."""
