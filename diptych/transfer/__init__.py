"""MOVES: KV blocks between workers. Start at `seam.py`; `local.py` and `shm.py` are the transports.

Bottom up: `layout` (what bytes mean), `pool` (memory), `native` (copies and checksums), `copying` (a plan, checked
and carried out), `reading` (threads, deadlines, settling), then what connects two workers: `description`, `handshake`,
`exporter`. Knows nothing of requests, leases or scheduling; imports no torch.
"""
