"""One process by itself, for code that is written for several."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from steepest.distributed.ranks import Ranks

__all__ = ["OneRank"]


class OneRank(Ranks):
    """The ranks where there is one: nothing travels, and no process group is needed.

    Example:
        >>> OneRank().gather_objects("mine")
        ['mine']
    """

    @property
    def rank(self) -> int:
        """Number of this process."""
        return 0

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Leave tensors as they are."""

    def broadcast_(self, tensors: Sequence[Tensor], source: int) -> None:
        """Leave tensors as they are."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor."""
        return [tensor]

    def exchange(
        self, send: Sequence[Tensor], target: int | None, receive: Sequence[Tensor], source: int | None
    ) -> Callable[[], None]:
        """Refuse: there is nobody.

        Raises:
            ValueError: Always.
        """
        raise ValueError("There is one process: nobody to send to.")

    def gather_objects(self, thing: Any) -> list[Any]:
        """The thing."""
        return [thing]
