"""The short form of `chaos.py`: workers are killed, stopped and woken under load, and no client notices."""

from pathlib import Path

from chaos import Storm, broken_laws, run

STORM = Storm(
    decode_kills=8, prefill_kills=3, doubles=1, stops=2, pauses=2, gap_s=0.6, clients=10, stuck_s=2.0, seed=5,
    prefill=2, decode=3,
)  # fmt: skip


def test_streams_survive_a_storm(tmp_path: Path) -> None:
    damage = run(STORM, tmp_path)
    assert broken_laws(STORM, damage) == []
    assert damage.resumed["kept"]["requests"] > 0 and damage.finished > 20, "the storm is too mild"
