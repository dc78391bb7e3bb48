"""What a worker's driver asks of the world around it: sockets and threads in a process of its own, or a queue.

Not responsible for what is asked (`worker.py`), nor for doing it (`worker_process.py`, `local.py`).
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from diptych.engine.executor import Sampling
from diptych.policy.membership import Drained, LinkMeasured
from diptych.policy.messages import Emit, Finish, Handover, Pull, Retention, Run
from diptych.serve.account import Account
from diptych.transfer.seam import Plan

ToPeer = Handover | Retention


class Ports(Protocol):
    """What a worker's driver asks of the world around it. No call waits."""

    def admit(self, rid: int, tokens: list[int], num_prompt: int, sampling: Sampling) -> None:
        """Tell the executor of a sequence."""

    def extend(self, rid: int, tokens: list[int]) -> None:
        """Tell the executor of tokens computed elsewhere."""

    def forget(self, rid: int) -> None:
        """Tell the executor to drop a sequence."""

    def run(self, step: Run) -> None:
        """Compute a step; `Driver.ran` takes the result."""

    def tell(self, peer: str, message: ToPeer, attachment: bytes) -> None:
        """Send to a peer."""

    def report(self, message: Emit | Finish | Drained | LinkMeasured | Account, attachment: bytes) -> None:
        """Send to the router."""

    def lane(self, peer: str) -> str:
        """How the blocks of a peer come here, for people to see."""

    def checksum(self, blocks: NDArray[np.int32]) -> NDArray[np.uint64]:
        """uint64 [n]: checksums of our own blocks, int32 [n]."""

    def pull(self, order: Pull, plan: Plan) -> None:
        """Start a read; `Driver.on` is to hear Read, or ReadFailed and Settled."""

    def cancel_pull(self, pull: int) -> None:
        """Ask a read to stop; `Driver.on` is to hear Settled (or Read, if it was done already)."""
