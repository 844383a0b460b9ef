"""What stands beside a result."""

import subprocess

from conftest import ROOT

from brainscale import provenance


def test_the_commit_is_that_of_the_checkout():
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert provenance.commit() == head.stdout.strip()


def test_where_there_is_no_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert provenance.commit() == ""


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    provenance.write_text(path, "before")
    provenance.write_text(path, "after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]
