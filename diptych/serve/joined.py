"""Who is connected to the router: workers that registered, and API processes with their numbers for requests."""

from dataclasses import dataclass

from diptych.policy.hashes import HASH_BYTES
from diptych.serve.channel import Channel
from diptych.serve.wire import Register, Submit, Ticket


@dataclass(slots=True)
class Joined:
    """A worker that registered; `up` once it is connected to its peers."""

    channel: Channel
    card: Register
    up: bool = False


class Client:
    """An API process: its channel, and its numbers for its requests beside ours."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.ours: dict[int, int] = {}
        self.theirs: dict[int, int] = {}

    def enter(self, theirs: int, ours: int) -> None:
        """A request was handed in."""
        self.ours[theirs], self.theirs[ours] = ours, theirs

    def leave(self, ours: int) -> int | None:
        """A request is over; returns the client's number."""
        theirs = self.theirs.pop(ours, None)
        if theirs is not None:
            del self.ours[theirs]
        return theirs


def fits(message: Submit, ticket: Ticket, block_size: int) -> bool:
    """What is said of a prompt's lengths is true."""
    full = message.num_prompt // block_size
    hashes = all(len(digest) == HASH_BYTES for digest in (*message.hashes, ticket.root or bytes(HASH_BYTES)))
    lengths = len(ticket.tokens) == 4 * message.num_prompt and ticket.num_prompt == message.num_prompt
    return hashes and lengths and len(message.hashes) <= full and message.max_new < 1 << 31
