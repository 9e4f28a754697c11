"""What is known of one block's roots: those in force, the jobs under way, and how it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds_shampoo.roots.jobs import Basis, RootAnswer, RootJob
from ds_shampoo.roots.tasks import Task
from ds_shampoo.roots.transfer import HostCopy


@dataclass
class RootCounts:
    """What became of the roots so far.

    Attributes:
        updates: roots put in force.
        fallbacks: those of them that a fallback gave.
        skipped: boundaries at which a statistic had moved too little to be solved again, or had only decayed.
        rejected: factors that got no root at a boundary although they have statistics.
        setbacks: boundaries at which a block kept its old roots for that reason.
        restarted: blocks whose statistics began afresh since one was not finite.
    """

    updates: int = 0
    fallbacks: int = 0
    skipped: int = 0
    rejected: int = 0
    setbacks: int = 0
    restarted: int = 0


@dataclass(frozen=True)
class Pending:
    """One block's jobs under way, a task per factor.

    Attributes:
        begun_at, due_at: the steps of the boundary and of putting the roots in force.
    """

    begun_at: int
    due_at: int
    jobs: list[RootJob]
    tasks: list[Task[RootAnswer]]

    def due(self, step: int) -> bool:
        return step >= self.due_at

    def state(self) -> dict[str, Any]:
        """What `SavedPending` is made of; copies, since the buffers are used again."""
        return {
            "begun_at": self.begun_at,
            "due_at": self.due_at,
            "snapshots": [job.snapshot.wait().clone() for job in self.jobs],
            "corrections": [job.correction for job in self.jobs],
            "updates": self.jobs[0].updates,
        }


@dataclass
class BlockRoots:
    """The history of one block's roots.

    Attributes:
        bases: per factor, what the root in force was computed from; None where there is none.
        solved: per factor, whether it has a root that was accepted.
        failures: consecutive boundaries at which a factor was rejected.
        setbacks: all of them.
        rooted_at: the step whose statistics the roots in force belong to; 0 for none.
        root_order: p of the roots in force; 0 for none.
        pending: the jobs under way, if any.
        reserved: per factor, a buffer for the next snapshot.
    """

    bases: list[Basis | None]
    solved: list[bool]
    reserved: list[HostCopy | None]
    failures: int = 0
    setbacks: int = 0
    rooted_at: int = 0
    root_order: float = 0
    pending: Pending | None = field(default=None, repr=False)

    @classmethod
    def fresh(cls, factors: int) -> BlockRoots:
        return cls([None] * factors, [False] * factors, [None] * factors)

    def forget_statistics(self) -> None:
        """The statistics begin afresh: no later one is to be compared with those of the roots in force."""
        self.bases = [None if basis is None else Basis(statistic=basis.statistic) for basis in self.bases]

    def forget_roots(self) -> None:
        """No root is in force any more."""
        self.bases, self.solved = [None] * len(self.bases), [False] * len(self.solved)

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers, from which `restored` makes the history again."""
        statistics = [None if basis is None else basis.statistic for basis in self.bases]
        state: dict[str, Any] = {
            "rooted": [statistic for statistic in statistics if statistic is not None],
            "rooted_traces": [0.0 if basis is None else basis.trace for basis in self.bases],
            "rooted_updates": [0 if basis is None else basis.updates for basis in self.bases],
            "solved": list(self.solved),
            "failures": self.failures,
            "setbacks": self.setbacks,
            "rooted_at": self.rooted_at,
            "order": self.root_order,
        }
        if self.pending is not None:
            state["pending"] = self.pending.state()
        return state

    @classmethod
    def restored(cls, state: Mapping[str, Any], root_order: float) -> BlockRoots:
        """The history that `state` was made of, without its jobs under way.

        Args:
            state: one that `check` found nothing wrong with.
            root_order: p of the job at hand; roots of another one count as none.
        """
        factors = len(state["solved"])
        saved_order = state.get("order", 0)
        if saved_order not in (0, root_order):
            block = cls.fresh(factors)
            block.failures, block.setbacks = int(state["failures"]), int(state["setbacks"])
            return block
        statistics: list[Tensor | None] = [tensor.to("cpu", copy=True) for tensor in state["rooted"]]
        if len(statistics) != factors:
            statistics = [None] * factors
        # Checkpoints of earlier releases lack these: no root of theirs is kept for its statistics having but decayed.
        traces = state.get("rooted_traces", [0.0] * factors)
        updates = state.get("rooted_updates", [0] * factors)
        bases = [Basis(float(t), int(n), a) for t, n, a in zip(traces, updates, statistics, strict=True)]
        return cls(
            list(bases),
            [bool(solved) for solved in state["solved"]],
            [None] * factors,
            int(state["failures"]),
            int(state["setbacks"]),
            int(state["rooted_at"]),
            saved_order,
        )


def check(state: Mapping[str, Any], orders: Sequence[int], numels: Sequence[int]) -> str:
    """What keeps a state from being taken up by a block with factors of these orders; empty where nothing does.

    Args:
        numels: of the packed factors.
    """
    missing = [key for key in ("rooted", "solved", "failures", "setbacks", "rooted_at") if key not in state]
    if missing:
        return f"the checkpoint lacks {', '.join(missing)}"
    for key in ("solved", "rooted_traces", "rooted_updates"):
        if key in state and len(state[key]) != len(orders):
            return f"'{key}' has {len(state[key])} entries in the checkpoint, but the block {len(orders)} factors"
    shapes = [tuple(tensor.shape) for tensor in state["rooted"]]
    if len(shapes) == len(orders) and shapes != [(order, order) for order in orders]:
        return f"'rooted' has the shapes {shapes} in the checkpoint, but the factors are of the orders {list(orders)}"
    pending = state.get("pending")
    return "" if pending is None else _check_pending(pending, numels)


def _check_pending(pending: Mapping[str, Any], numels: Sequence[int]) -> str:
    missing = [key for key in ("begun_at", "due_at", "snapshots", "corrections") if key not in pending]
    if missing:
        return f"the jobs under way in the checkpoint lack {', '.join(missing)}"
    shapes = [tuple(tensor.shape) for tensor in pending["snapshots"]]
    if shapes != [(numel,) for numel in numels]:
        return f"the snapshots under way have the shapes {shapes} in the checkpoint, but {list(numels)} elements here"
    corrections = pending["corrections"]
    if len(corrections) != len(numels) or not all(float(correction) > 0 for correction in corrections):
        return f"the jobs under way have the bias corrections {corrections}; {len(numels)} above 0 are needed"
    return ""
