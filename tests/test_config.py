"""What files and flags are taken, and what is refused with a line that says what to change."""

import json
from pathlib import Path

import pytest

from diptych import modelfacts
from diptych.config import DEMO, load_cluster
from diptych.errors import ConfigError
from diptych.serve.build import cluster_card
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


def test_a_model_goes_by_the_name_it_is_given() -> None:
    assert cluster_card(load_cluster(None, {})).name == "diptych-demo"
    card = cluster_card(load_cluster(None, {"served_model_name": "fox", "model": str(DEMO)}))
    assert (card.name, card.aliases) == ("fox", ())
    assert cluster_card(load_cluster(None, {"model": str(DEMO)})).aliases == (str(DEMO),)


@pytest.mark.parametrize("origin", ["chat.example.org", "https://a/b", "", "ftp://a"])
def test_an_origin_is_a_scheme_and_a_host(origin: str) -> None:
    with pytest.raises(ConfigError, match="origin"):
        load_cluster(None, {"cors_origins": [origin]})
    assert load_cluster(None, {"cors_origins": ["*", "http://a:1"]}).cors_origins == ("*", "http://a:1")


def test_max_batch_is_of_every_worker() -> None:
    assert {worker.max_batch for worker in load_cluster(None, {"max_batch": 7}).workers} == {7}
    with pytest.raises(ConfigError, match="'max_batch' must be at least 1"):
        load_cluster(None, {"max_batch": 0})
