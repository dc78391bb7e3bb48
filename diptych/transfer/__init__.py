"""MOVES: KV blocks between workers. Start at `seam.py`; `local.py`, `shm.py`, `tcp.py` carry, `reach.py` picks one.

Bottom up: `layout` (what bytes mean), `pool` (memory), `native` (copies and checksums, sockets too), `copying` (a plan,
checked and carried out), `reading` (threads, deadlines, settling), then what connects two workers: `description`,
`listening`; on one host `handshake`, `exporter`; between hosts `introduction`, `frames`, `codec`, `serving`, `stream`;
`emulated` makes links slow that are not. Knows nothing of requests, leases or scheduling; imports no torch.
"""
