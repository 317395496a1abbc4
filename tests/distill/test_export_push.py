"""`--push`: the calls to the hub, and messages where it refuses. Its client is replaced; no request leaves the machine."""

from types import SimpleNamespace

import pytest

import distill
from distill.errors import UserError


@pytest.fixture
def hub(monkeypatch):
    """A hub that writes down what it is asked. failing: what its calls raise, by name; private: what it says."""
    found = SimpleNamespace(calls=[], failing={}, private=True)

    class Api:
        endpoint = "https://hub.example"

        def __getattribute__(self, name):
            if name == "endpoint":
                return "https://hub.example"

            def call(*arguments, **options):
                found.calls.append((name, arguments, options))
                if name in found.failing:
                    raise found.failing[name]
                return SimpleNamespace(private=found.private)

            return call

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return found


def push(run, out, **options):
    return distill.export(run, out=out, **{"verify": False, "push": "me/my-student", **options})


def test_it_is_private_and_holds_the_exports_files_alone(hub, untrained_run, tmp_path):
    out = distill.export(untrained_run, out=tmp_path / "out", verify=False)
    (out / "secret.txt").write_text("mine")
    assert not hub.calls
    push(untrained_run, out)
    names = [name for name, _, _ in hub.calls]
    assert names == ["create_repo", "repo_info", "upload_folder"]
    assert hub.calls[0][1:] == (("me/my-student",), {"private": True, "exist_ok": True})
    upload = hub.calls[2][2]
    assert upload["repo_id"] == "me/my-student" and upload["folder_path"] == str(out)
    assert {"README.md", "model.safetensors", "config.json"} < set(upload["allow_patterns"])
    assert not {"secret.txt", ".exported-by-distill"} & set(upload["allow_patterns"])
    assert 'from_pretrained("me/my-student"' in (out / "README.md").read_text()


def test_public(hub, untrained_run, tmp_path):
    hub.private = False
    with pytest.raises(
        UserError, match="the repository me/my-student exists and is public; nothing was pushed: add --public"
    ):
        push(untrained_run, tmp_path / "out")
    assert [name for name, _, _ in hub.calls] == ["create_repo", "repo_info"] and (tmp_path / "out" / "README.md").exists()
    hub.calls.clear()
    push(untrained_run, tmp_path / "out", public=True)
    assert hub.calls[0][2] == {"private": False, "exist_ok": True} and hub.calls[-1][0] == "upload_folder"


def answer(status):
    error = RuntimeError(f"{status} Client Error\nmore of it")
    error.response = SimpleNamespace(status_code=status)
    return error


def test_what_a_hub_refuses(hub, untrained_run, tmp_path):
    from huggingface_hub import errors

    for call, error, said in (
        (
            "create_repo",
            errors.LocalTokenNotFoundError("no token"),
            "you are not logged in to the hub; log in with `hf auth login`",
        ),
        ("create_repo", answer(401), "you are not logged in to the hub; .*HF_TOKEN"),
        ("create_repo", answer(403), "your token may not write there"),
        ("upload_folder", answer(500), r"the hub answered 500 \(500 Client Error\)"),
        ("upload_folder", ConnectionError("Name or service not known"), "cannot be reached .*try again with a network"),
        ("create_repo", errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE keeps this machine off the hub"),
        ("repo_info", ValueError("odd"), "odd"),
    ):
        hub.failing = {call: error}
        with pytest.raises(UserError, match=f"the push to me/my-student failed: .*{said}") as raised:
            push(untrained_run, tmp_path / "out")
        assert f"The export is in {tmp_path / 'out'}; `hf upload REPO {tmp_path / 'out'}`" in str(raised.value)
        assert (tmp_path / "out" / "model.safetensors").exists()


def test_nothing_is_pushed_that_was_not_written(hub, untrained_run, tmp_path, monkeypatch):
    def prove(*arguments, **options):
        raise UserError("another function")

    monkeypatch.setattr("distill.exporters.proofs.prove", prove)
    with pytest.raises(UserError, match="another function"):
        push(untrained_run, tmp_path / "out", verify=True)
    assert not hub.calls
