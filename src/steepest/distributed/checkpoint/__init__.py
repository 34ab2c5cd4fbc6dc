"""Checkpoints as folders, written by all processes: tensors by torch.distributed.checkpoint, all else as JSON."""

__all__: list[str] = []
