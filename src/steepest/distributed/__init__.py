"""What several processes do together, over torch.distributed; it knows no optimizer and no model."""

from steepest.distributed.assignment import assign_by_cost
from steepest.distributed.ranks import Ranks, Traffic

__all__ = ["Ranks", "Traffic", "assign_by_cost"]
