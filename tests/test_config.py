"""What files and flags are taken, and what is refused with a line that says what to change."""

import json
from pathlib import Path

import pytest

from diptych import modelfacts
from diptych.config import DEMO, load_cluster
from diptych.errors import ConfigError
from diptych.serve.text import Text


def test_a_paced_model_speaks_with_the_words_of_its_tokenizer(tmp_path: Path) -> None:
    assert load_cluster(None, {"engine": "paced"}).paced.vocab == Text.load(DEMO).vocab_size
    assert load_cluster(None, {"engine": "paced", "paced": {"vocab": 77}}).paced.vocab == 77
    for words, size in (({"a": 0, "b": 7}, 9), ([["a", 0.0], ["b", -1.0]], 9)):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": [{"id": 8}]}))
        assert load_cluster(None, {"engine": "paced", "model": str(tmp_path)}).paced.vocab == size
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": "b"}}, "added_tokens": [{}]}')
    with pytest.raises(ConfigError, match="tokenizer"):
        modelfacts.num_tokens(tmp_path)
