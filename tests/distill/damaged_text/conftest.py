"""Files of text, and the messages with which they are refused."""

import pytest

from distill.errors import UserError
from distill.recipe import TextSource
from distill.text.preparation import prepare


@pytest.fixture
def refused(tokenizer, tmp_path):
    """What a source is refused with; the message is one line, and nothing is left in the cache."""

    def refused(**source):
        given = {"longest": source.pop("longest")} if "longest" in source else {}
        with pytest.raises(UserError) as caught:
            prepare([TextSource(**source)], tokenizer, separator=None, seed=0, limit=None, where="data.train", **given)
        assert not list((tmp_path / "cache").rglob("prepared/*"))
        said = str(caught.value)
        assert said.startswith("data.train") and "\n" not in said and len(said) < 900, said
        return said

    return refused


@pytest.fixture
def written(tmp_path):
    def written(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return written
