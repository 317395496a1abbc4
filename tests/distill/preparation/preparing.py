"""The content of prepared text, and preparations that stop."""

from distill.text import shards

SIZE = 600  # tokens of a shard here
KINDS = ["local", "mixture", "set", "set and files", "several documents a row"]


def content(folder):
    """The bytes of everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stopping(monkeypatch, after, error=KeyboardInterrupt):
    """Have the document of this number end the preparation."""
    add = shards.Writer.add

    def counted(self, *given):
        if self.documents == after:
            raise error()
        add(self, *given)

    monkeypatch.setattr(shards.Writer, "add", counted)
    return lambda: monkeypatch.setattr(shards.Writer, "add", add)
