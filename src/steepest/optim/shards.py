"""Which rank decomposes and preconditions which layer, and how the others come by what it found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steepest.distributed.assignment import assign_by_cost
from steepest.distributed.ranks import Ranks
from steepest.linalg.decompositions import Decomposition
from steepest.linalg.kronecker import Cholesky, DecompositionError, Eigenbasis, KroneckerSolver
from steepest.optim.blocks import Block
from steepest.optim.combining import exchange_like, sides
from steepest.optim.crew import Crew
from steepest.optim.plan import Draft

__all__ = ["Shards"]

# A direction, and the numbers that a subclass of KFAC tells with it.
Found = tuple[Tensor, Tensor | None]
# Sizes, strides and type: in another layout the same product is rounded differently.
Outline = dict[str, tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
# By layer: the message, and whether the last good decomposition is there to go on with.
Errors = dict[str, tuple[str, bool]]


class Shards:
    """Divides the work on layers among ranks, by the cost of their decompositions; alone, one process does all of it.

    One rank owns a layer and decomposes it; it and its team, the workers, precondition it (with "replicated" all do
    all of it).

    Args:
        crew: The ranks.
        solver: How layers are decomposed. One that learns from gradients needs the bases on every rank.
        blocks: All layers, by the name of their weight.
    """

    def __init__(self, crew: Crew, solver: KroneckerSolver, blocks: Mapping[str, Block]) -> None:
        self._crew, self._solver, self._blocks = crew, solver, blocks
        self._learns = not isinstance(solver, (Eigenbasis, Cholesky))
        self._owners: dict[str, int] = {}
        self._size = 0

    @property
    def _device(self) -> torch.device:
        return next(iter(self._blocks.values())).weight.device

    @property
    def is_partial(self) -> bool:
        """Whether no rank has all decompositions."""
        return self._crew.workers < self._crew.place[1] and not self._learns

    def owner(self, block: Block) -> int:
        """The rank that decomposes the layer."""
        size = self._crew.place[1]
        if size != self._size:
            dims = [(*sides(b), b.is_table) for b in self._blocks.values()]
            costs = [float(n**3 + (m if is_table else m**3)) for n, m, is_table in dims]
            self._owners = dict(zip(self._blocks, assign_by_cost(costs, size, self._crew.workers), strict=True))
            self._size = size
        return self._owners[block.names[0]]

    def _owns(self, block: Block) -> bool:
        return self.owner(block) == self._crew.place[0]

    def _team(self, rank: int) -> int:
        """The team that a rank is in, in which every layer of its members is preconditioned by all."""
        return rank // self._crew.workers

    def _works_on(self, block: Block) -> bool:
        return self._team(self.owner(block)) == self._team(self._crew.place[0])

    def keeps(self, block: Block) -> bool:
        """Whether this rank has the layer's decomposition between steps."""
        return not self.is_partial or self._works_on(block)

    def decompose(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Decompose the layers whose time it is; where that fails the last good decomposition stays in use.

        Args:
            drafts: All layers of the step.

        Returns:
            The same with their new curvatures.

        Raises:
            DecompositionError: If there is no good decomposition, or it failed too often in a row.
        """
        ranks, stale = self._crew.ranks, [draft for draft in drafts if draft.is_stale]
        if not stale:
            return list(drafts)
        found, errors = self._own_decompositions(stale)
        if ranks is not None:
            errors = self._exchanged(ranks, found, errors)
        fatal = [text for text, may_go_on in errors.values() if not may_go_on]
        if fatal:
            raise DecompositionError(fatal[0])
        return [self._renewed(draft, found, errors) for draft in drafts]

    def _own_decompositions(self, stale: Sequence[Draft]) -> tuple[dict[str, Decomposition], Errors]:
        found: dict[str, Decomposition] = {}
        errors: Errors = {}
        for draft in stale:
            alone = self._crew.ranks is None or self._crew.distribution == "replicated"
            if self._crew.trouble is not None or not (alone or self._owns(draft.block)):
                continue
            name = draft.block.names[0]
            with self._crew.guarded():
                try:
                    found[name] = draft.curvature.decompose(self._solver, draft.group["damping"])
                except DecompositionError as error:
                    errors[name] = f"Layer {draft.block.name!r}: {error}", draft.curvature.may_fail
        return found, errors

    def _exchanged(self, ranks: Ranks, found: dict[str, Decomposition], errors: Errors) -> Errors:
        """Let all ranks know which decompositions failed, and give them the others where they need them."""
        spread = self._crew.distribution != "replicated" and (self._crew.workers > 1 or self._learns)
        own = {name: made.tensors() for name, made in found.items()} if spread else {}
        told = ranks.gather_objects((self._crew.trouble is not None, errors, _outlines(own)))
        if any(trouble for trouble, _, _ in told):
            ranks.agree(self._crew.trouble)
        inside = None
        if spread:  # all learn, or those who precondition the layer want it
            inside = ranks if self._learns else self._crew.teams(ranks, self._device).inside
        if inside is not None:
            start = ranks.rank - inside.rank
            outlines = [outlines for _, _, outlines in told[start : start + inside.size]]
            lacking = self._spread(inside, outlines, own)
            with self._crew.guarded():
                found.update({name: self._solver.restore(tensors) for name, tensors in lacking.items()})
        return {name: error for _, theirs, _ in reversed(told) for name, error in theirs.items()}

    def _renewed(self, draft: Draft, found: Mapping[str, Decomposition], errors: Errors) -> Draft:
        name = draft.block.names[0]
        if not draft.is_stale:
            return draft
        curvature = draft.curvature
        return replace(draft, curvature=curvature.failed() if name in errors else curvature.renewed(found.get(name)))

    def _spread(
        self, ranks: Ranks, told: Sequence[Mapping[str, Outline]], own: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Broadcast what one rank has and another lacks, from the first that has it; return what was lacking here."""
        done = {name for outlines in told for name in outlines if all(name in others for others in told)}
        lacking = {}
        for rank, outlines in enumerate(told):
            made: dict[str, dict[str, Tensor]] = {}
            for name in outlines.keys() - done:
                device = self._blocks[name].weight.device
                made[name] = {
                    key: own[name][key] if name in own else torch.empty_strided(*sizes, dtype=dtype, device=device)
                    for key, (*sizes, dtype) in outlines[name].items()
                }
            done.update(made)
            if made:
                ranks.broadcast_([t for name in sorted(made) for t in made[name].values()], rank)
            lacking.update({name: tensors for name, tensors in made.items() if name not in own})
        return lacking

    def missing_elsewhere(self, own: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Bring the decompositions of all layers to every rank; all of them must come here.

        Args:
            own: Tensors of the decompositions on this rank, by layer.

        Returns:
            Those that this rank lacked, by layer.
        """
        ranks = self._crew.ranks
        return {} if ranks is None else self._spread(ranks, ranks.gather_objects(_outlines(own)), own)

    def directions(self, drafts: Sequence[Draft], direct: Callable[[Draft], Found], extra: int) -> list[Found]:
        """Precondition every layer, here or on the rank of its owner's team that tells this one.

        Args:
            drafts: All layers of the step.
            direct: Preconditions a layer; returns its direction, and the numbers that go with it.
            extra: How many those numbers are.

        Returns:
            The direction of every layer and its numbers; anything where this rank is in trouble.
        """
        ranks = self._crew.ranks
        if ranks is None or not drafts:
            return [direct(draft) for draft in drafts]
        results = []
        for draft in drafts:
            found = None
            if self._crew.trouble is None and self._works_on(draft.block):
                with self._crew.guarded():
                    found = direct(draft)
            results.append(_alike(draft.block, found, extra))
        across = self._crew.teams(ranks, self._device).across
        if across is not None:
            owners = [self._team(self.owner(draft.block)) for draft in drafts]
            for team in range(across.size):
                theirs = [found for owner, found in zip(owners, results, strict=True) if owner == team]
                if theirs:
                    across.broadcast_([tensor for pair in theirs for tensor in pair if tensor is not None], team)
        return results


def _alike(block: Block, found: Found | None, extra: int) -> Found:
    """A direction as it is exchanged; zeros to be overwritten where there is none."""
    like = exchange_like(block)
    if found is None:
        return torch.zeros(sides(block), **like), torch.zeros(extra, **like) if extra else None
    return found[0].to(**like).contiguous(), None if found[1] is None else found[1].to(**like)


def _outlines(own: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Outline]:
    return {
        name: {key: (tuple(tensor.shape), tensor.stride(), tensor.dtype) for key, tensor in tensors.items()}
        for name, tensors in own.items()
    }
