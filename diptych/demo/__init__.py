"""The bundled demo model: a tiny Llama-shaped checkpoint and generators of text it understands.

``DEMO_DIR`` is the checkpoint folder (config, safetensors, tokenizer, chat template). The modules
:mod:`diptych.demo.notes` and :mod:`diptych.demo.chat` need nothing but the standard library.
"""

from __future__ import annotations

from pathlib import Path

DEMO_DIR: Path = Path(__file__).resolve().parent
"""Folder of the bundled checkpoint, loadable with ``AutoModelForCausalLM.from_pretrained``."""

__all__ = ["DEMO_DIR"]
