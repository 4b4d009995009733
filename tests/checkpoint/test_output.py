"""What the user names for a result is written whole, and only a file is ever replaced."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_adam.base import InputError
from compiled_adam.checkpoint import output
from conftest import ROOT


def test_new_and_old_files(tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    output.write(file, b"one")
    umask = os.umask(0)
    os.umask(umask)
    assert file.read_bytes() == b"one" and stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    file.chmod(0o640)
    output.write(file, b"two")
    assert file.read_bytes() == b"two" and stat.S_IMODE(file.stat().st_mode) == 0o640
    longest, suffix = tmp_path / ("n" * 255), tmp_path / f"n.{'s' * 253}"
    for each in (longest, suffix):
        output.write(each, b"three")
    assert sorted(tmp_path.iterdir()) == sorted([file, longest, suffix])


@pytest.mark.parametrize("old", [True, False])
def test_a_link_stays_a_link(old: bool, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    target, link, further = tmp_path / "site" / "a.html", tmp_path / "link.html", tmp_path / "further.html"
    if old:
        target.write_text("old")
    link.symlink_to("site/a.html")
    further.symlink_to(link)
    output.write(further, b"new")
    assert target.read_text() == "new" and link.is_symlink() and further.is_symlink()
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["a.html"]


def test_what_is_no_file_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nowhere").symlink_to("missing/a")
    (tmp_path / "file").write_text("")
    place = os.getcwd()
    os.chdir(tmp_path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.bind("socket")
        finally:
            os.chdir(place)
        before = {path.name: path.lstat() for path in tmp_path.iterdir()}
        for name, message in (
            ("pipe", "is a pipe; name a file, new or old"),
            ("to_pipe", "is a pipe"),
            ("folder", "is a folder"),
            ("socket", "is a socket"),
            ("circle", "cannot be written: Too many levels of symbolic links"),
            ("nowhere", "missing is no folder; make it first"),
            ("missing/a", "missing is no folder; make it first"),
            ("file/a", "cannot be written: Not a directory"),
            ("n" * 256, "cannot be written: File name too long"),
            ("/dev/null", "is a device"),
            ("/dev/full", "is a device"),
        ):
            with pytest.raises(InputError) as raised:
                output.write(tmp_path / name, b"new")
            assert str(raised.value).startswith(str(tmp_path / name)) and message in str(raised.value)
        assert {path.name: path.lstat() for path in tmp_path.iterdir()} == before


def test_where_messages_go_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--out x.html > x.html``, and /dev/stdout when it is a file: what the shell has opened would be thrown away."""
    with open(tmp_path / "out", "w") as stream:
        monkeypatch.setattr(output, "_STREAMS", (stream.fileno(),))
        for path in (tmp_path / "out", Path(f"/dev/fd/{stream.fileno()}")):
            with pytest.raises(InputError, match="is where this command's own messages go"):
                output.write(path, b"new")
    read, write = os.pipe()  # /dev/stdout before a pipe
    with pytest.raises(InputError, match="is a pipe"):
        output.write(Path(f"/dev/fd/{write}"), b"new")
    os.close(read)
    os.close(write)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_file_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o444)
    with pytest.raises(InputError, match="is read-only"):
        output.write(tmp_path / "a", b"new")


open_file = open


@pytest.mark.parametrize("failing", ["fsync", "write"])
def test_a_full_disk_leaves_what_was_there(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("old")
    if failing == "fsync":
        monkeypatch.setattr(output.os, "fsync", full)
    else:
        monkeypatch.setattr(output, "open", lambda *_: open_file("/dev/full", "wb"), raising=False)
        monkeypatch.setattr(output.os, "fchmod", lambda *_: None)
    with pytest.raises(OSError, match="a could not be written: No space left on device; nothing of it was changed"):
        output.write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["log.jsonl", "ü" * 120])
def test_what_a_killed_writer_has_left_goes_with_the_next_one(name: str, tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
from pathlib import Path
from compiled_adam.checkpoint import output
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
output.write(Path({name!r}), b"half")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 1
    output.write(tmp_path / name, b"whole")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"whole"
