"""Checkpoints as folders: tensors by torch.distributed.checkpoint, everything else as JSON beside them."""

__all__: list[str] = []
