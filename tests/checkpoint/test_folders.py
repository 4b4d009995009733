"""Folders that are replaced as a whole: seen by readers, by other writers, and after a kill at the worst moment."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import ModuleType

import compiled_adam as ca
import mlx.core as mx
import pytest
from compiled_adam.checkpoint import checkpoint, claims, durable, meta, series

from tests.written_folders import load, make, save, write


def read(folder: Path) -> set[str]:
    with durable.opened(folder, "ab") as (_, files):
        return {file.read().decode() for file in files.values()} if len(files) == 2 else {"missing"}


# Readers.


@pytest.mark.parametrize("at", range(5))
def test_a_replacement_while_files_are_opened(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "last", 1)
    real, calls = durable._regular, []

    def regular(file: Path, folder: int):
        calls.append(file)
        if len(calls) == at + 1:
            save(tmp_path / "last", 2)
        return real(file, folder)

    monkeypatch.setattr(durable, "_regular", regular)
    # The old one's files are opened before they are removed, or else the new one's: the window, which neither has, is
    # asked for last.
    assert load(tmp_path / "last") == 2 if at < 4 else 1
    assert os.listdir(tmp_path) == ["last"]


@pytest.mark.parametrize("function", ["parsed", "record", "_load"])
def test_a_replacement_while_files_are_read(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "last", 1)
    real, values = getattr(checkpoint, function), [2, 3]

    def replaced(*arguments):
        if values:
            monkeypatch.setattr(checkpoint, function, real)  # writers use it as well
            save(tmp_path / "last", values.pop(0))
            monkeypatch.setattr(checkpoint, function, replaced)
        return real(*arguments)

    monkeypatch.setattr(checkpoint, function, replaced)
    assert load(tmp_path / "last") == 1
    assert os.listdir(tmp_path) == ["last"]


def test_a_folder_that_moves_whenever_it_is_looked_for_is_found(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "last", "1")
    real, values = os.open, list("23456")

    def moving(path, *arguments, **more):
        if Path(path) == tmp_path / "last" and values:
            value = values.pop()
            with monkeypatch.context() as patch:
                patch.setattr(os, "open", real)
                write(tmp_path / "last", value)
            raise FileNotFoundError  # as it was between the two renamings
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", moving)
    assert read(tmp_path / "last") == {"2"}


def test_a_newest_that_is_pruned_while_it_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    save(run / "1", 1)
    real = checkpoint.check_checkpoint

    def pruned(path: Path):
        if path.name == "1":
            save(run / "2", 2)
            monkeypatch.setattr(series, "check_checkpoint", real)
            assert series.prune(run, 1) == [run / "1"]
        return real(path)

    monkeypatch.setattr(series, "check_checkpoint", pruned)
    warnings: list[str] = []
    assert ca.latest_checkpoint(run, warn=warnings.append) == run / "2"
    assert not warnings  # nothing is damaged


# Writers.


def test_writers_in_each_other_are_both_whole_and_the_last_one_stays(tmp_path: Path) -> None:
    last = tmp_path / "last"
    write(last, "0")
    with durable.replacing(last) as first:
        (first / "a").write_text("1")
        with durable.replacing(last) as second:
            assert first != second and len(list(tmp_path.iterdir())) == 3
            for name in "ab":
                (second / name).write_text("2")
        assert read(last) == {"2"}
        (first / "b").write_text("1")
    assert read(last) == {"1"} and os.listdir(tmp_path) == ["last"]


def test_many_writers_and_a_reader_at_once(tmp_path: Path) -> None:
    last = tmp_path / "last"
    write(last, "begin")
    with ThreadPoolExecutor(5) as pool:
        writers = [pool.submit(lambda i: [write(last, f"{i}.{j}") for j in range(12)], i) for i in range(4)]
        seen = []
        while not all(writer.done() for writer in writers):
            seen.append(read(last))
        for writer in writers:
            writer.result()
    assert all(len(values) == 1 and "missing" not in values for values in seen), seen
    assert os.listdir(tmp_path) == ["last"] and max(read(last)).endswith(".11")


def test_another_writer_in_the_gap_between_the_two_renamings(tmp_path: Path, monkeypatch) -> None:
    last = tmp_path / "last"
    write(last, "0")
    real, others = durable._renamed, ["2"]

    def renamed(new: Path, path: Path) -> bool:
        if others:
            # What another writer does that has found neither the folder nor its old place a moment ago.
            with claims.claimed(path, Path.mkdir) as temporary:
                for name in "ab":
                    (temporary / name).write_text(others[0])
                others.pop()
                assert real(temporary, path)
        return real(new, path)

    monkeypatch.setattr(durable, "_renamed", renamed)
    write(last, "1")
    assert read(last) == {"1"} and os.listdir(tmp_path) == ["last"]


def test_what_is_discarded_does_not_come_back_from_its_old_place(tmp_path: Path) -> None:
    write(tmp_path / "1", "0")
    (tmp_path / ".1.old").mkdir()
    assert durable.discard(tmp_path / "1") and not os.listdir(tmp_path)


def test_of_a_link_only_the_link_is_discarded(tmp_path: Path) -> None:
    write(tmp_path / "there", "0")
    (tmp_path / "1").symlink_to(tmp_path / "there")
    assert durable.discard(tmp_path / "1") and os.listdir(tmp_path) == ["there"] and read(tmp_path / "there") == {"0"}


def test_who_waits_for_a_lock_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "last", "0")
    monkeypatch.setattr(claims, "PATIENCE", 0.0)
    with claims.held(tmp_path / "last"), pytest.raises(TimeoutError, match="last has been in use by another process"):
        write(tmp_path / "last", "1")
    assert read(tmp_path / "last") == {"0"} and os.listdir(tmp_path) == ["last"]
    # Who is still removing what was replaced would remove what is moved there next.
    (tmp_path / ".last.old").mkdir()
    with (
        claims.held(tmp_path / ".last.old"),
        pytest.raises(TimeoutError, match=r"\.last\.old has been in use by another"),
    ):
        write(tmp_path / "last", "1")
    assert read(tmp_path / "last") == {"0"} and sorted(os.listdir(tmp_path)) == [".last.old", "last"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(claims.fcntl, "flock", unsupported)
    recent, ancient = (tmp_path / f".last.{c * 16}.partial" for c in "ab")
    recent.mkdir()
    ancient.mkdir()
    os.utime(ancient, (1, 1))
    for value in "01":
        write(tmp_path / "last", value)
    # What is recent may be of a process that lives.
    assert read(tmp_path / "last") == {"1"} and sorted(os.listdir(tmp_path)) == [recent.name, "last"]


# Errors and interrupts.


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_whatever_fails_leaves_the_old_folder_and_nothing_else(error, tmp_path: Path, monkeypatch) -> None:
    last = tmp_path / "last"
    write(last, "0")
    for module, name, call, left in (
        (claims, "_own", 0, "0"),
        (durable, "flush", 0, "0"),
        (durable, "held", 0, "0"),
        (durable, "remove", 0, "0"),
        (durable, "_renamed", 0, "0"),
        (durable, "flush", 1, "1"),  # the new one has taken its place
        (durable, "_tidy", 0, "1"),
        (durable, "remove", 1, "1"),
        (claims, "remove", 0, "1"),
    ):
        real, calls = getattr(module, name), iter([None] * call + [error("here")])

        def failing(*arguments, real=real, calls=calls):
            if failure := next(calls, None):
                raise failure
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            with pytest.raises(error):
                write(last, "1")
        assert read(last) == {left}, (name, call)
        assert os.listdir(tmp_path) == ["last"], (name, call)
        write(last, "0")


def test_a_renaming_that_is_refused_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = Path.rename, [PermissionError(errno.EACCES, "Permission denied")]

    def refused(path: Path, target: Path) -> Path:
        if failures:
            raise failures.pop()
        return real(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        write(tmp_path / "last", "1")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_arrays_that_cannot_be_written_leave_the_old_ones(error, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "adapters.safetensors"
    durable.replace_arrays(file, {"a": mx.array(1)})
    real = mx.save_safetensors

    def failing(name: str, arrays) -> None:
        real(name, arrays)
        raise error("here")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", failing)
        with pytest.raises(OSError if error is RuntimeError else error):
            durable.replace_arrays(file, {"a": mx.array(2)})
    assert os.listdir(tmp_path) == [file.name] and mx.load(str(file))["a"].item() == 1
    durable.replace_arrays(file, {"a": mx.array(2)})
    assert os.listdir(tmp_path) == [file.name] and mx.load(str(file))["a"].item() == 2


class AtLine:
    """Raises KeyboardInterrupt before the n-th line that runs in the modules; ``lines`` is how many ran."""

    def __init__(self, n: int, *modules: ModuleType) -> None:
        self.n, self.lines, self.files = n, 0, {module.__file__ for module in modules}

    def __call__(self, frame, event: str, _: object):
        code = frame.f_code
        if code.co_filename not in self.files or code.co_name == "__del__":
            return None  # out of a __del__ Python raises nothing
        if event == "line":
            self.lines += 1
            if self.lines == self.n:
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> AtLine:
        self.before = sys.gettrace()  # of a debugger, say
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


@pytest.mark.parametrize("kind", [pytest.param("folder", marks=pytest.mark.slow), "arrays", "discard"])
def test_an_interrupt_at_any_line(kind: str, tmp_path: Path) -> None:
    last, file = tmp_path / "last", tmp_path / "adapters.safetensors"
    n, finished = 0, False
    while not finished:
        n += 1
        write(last, "0")
        durable.replace_arrays(file, {"a": mx.array(0)})
        try:
            with AtLine(n, claims, durable):
                if kind == "folder":
                    write(last, "1")
                elif kind == "arrays":
                    durable.replace_arrays(file, {"a": mx.array(1)})
                else:
                    durable.discard(last)
            finished = True
        except KeyboardInterrupt:
            pass
        assert {*os.listdir(tmp_path), "last"} == {"last", file.name}, n  # nothing else is left
        if kind != "discard" or last.exists():
            assert read(last) in ({"0"}, {"1"}), n
        assert mx.load(str(file))["a"].item() in (0, 1)
    assert n > 30


@pytest.mark.slow
def test_an_interrupt_at_many_lines_of_a_save(tmp_path: Path) -> None:
    steps, threads = (make(1), make(2)), threading.active_count()
    n, finished = 0, False
    while not finished:
        n += 17
        ca.save_checkpoint(tmp_path / "last", steps[0], {"value": 1})
        try:
            with AtLine(n, claims, durable, checkpoint, meta):
                ca.save_checkpoint(tmp_path / "last", steps[1], {"value": 2})
            finished = True
        except KeyboardInterrupt:
            pass
        assert load(tmp_path / "last") in (1, 2) and os.listdir(tmp_path) == ["last"], n
        assert threading.active_count() == threads, n
    assert n > 1000


def test_who_reads_a_growing_file_ends_when_it_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    with FileIO(file) as stream:
        file.unlink()
        assert (
            durable.record(stream, threading.Event())["bytes"] == 3
        )  # whoever wrote it cannot say that it is complete


# What is in the way.


def test_links_stay_links(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "run").symlink_to(disk)
    (tmp_path / "last").symlink_to(disk / "last")  # which is not there yet
    for value in (1, 2):
        save(tmp_path / "last", value)
        save(tmp_path / "run" / "1", value)
    assert load(tmp_path / "last") == load(disk / "last") == load(disk / "1") == 2
    assert sorted(os.listdir(disk)) == ["1", "last"] and sorted(os.listdir(tmp_path)) == ["disk", "last", "run"]
    file = tmp_path / "adapters.safetensors"
    file.symlink_to(disk / "there.safetensors")
    durable.replace_arrays(file, {"a": mx.array(1)})
    assert file.is_symlink() and mx.load(str(disk / "there.safetensors"))["a"].item() == 1


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no second file system")
def test_a_link_to_another_disk(tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"compiled-adam-test-{os.getpid()}"
    if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("the same file system")
    try:
        (tmp_path / "run").symlink_to(other)
        for value in (1, 2):
            save(tmp_path / "run" / "1", value) if other.exists() else save(tmp_path / "run", value)
            assert load(tmp_path / "run") == value if value == 1 else load(other / "1") == 2
    finally:
        claims.remove(other)


def test_what_cannot_be_replaced_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "away").symlink_to(tmp_path / "disk" / "run")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").write_text("mine")
    for folder, message in (
        (tmp_path / "away", r"away is a link to .*disk/run, and there is no folder .*disk; make it, or mend"),
        (tmp_path / "away" / "1", r"away is a link to .*disk/run, and there is no folder .*disk; make it, or mend"),
        (tmp_path / "circle", "circle is a link that leads in a circle"),
        (tmp_path / "file", "file exists and is not a checkpoint; name another folder"),
        (Path("/proc"), "proc exists and is not a checkpoint" if os.path.isdir("/proc") else ""),
    ):
        with pytest.raises(ValueError, match=message):
            save(folder, 1)
    with pytest.raises(ValueError, match="file is not a folder; move it away"):
        write(tmp_path / "file", "1")
    with pytest.raises(OSError, match=r"file"):
        save(tmp_path / "file" / "1", 1)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["away", "circle", "file"]


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    def refused(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "a name that nobody knows")

    with (
        pytest.raises(PermissionError, match=rf"last cannot be written: Permission denied: '{tmp_path}'"),
        claims.claimed(tmp_path / "last", refused),
    ):
        pass


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a file system")
def test_a_folder_where_a_disk_is_mounted(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=False).returncode:
        pytest.skip("cannot mount here")
    try:
        with pytest.raises(
            ValueError, match="disk is where a disk is mounted, and cannot be replaced; name a folder in"
        ):
            save(disk, 1)
        save(disk / "1", 1)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(OSError, match=rf"2 cannot be written: Read-only file system: '{disk}'"):
            save(disk / "2", 1)
        with pytest.raises(OSError, match="Read-only file system"):
            save(disk / "1", 2)
        assert load(disk / "1") == 1 and ca.latest_checkpoint(disk) == disk / "1"
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", ["meta.json", "weights.safetensors", "optimizer.safetensors"])
def test_something_else_than_a_file_is_named_and_nobody_waits_for_it(name: str, tmp_path: Path, monkeypatch) -> None:
    save(tmp_path / "1", 1)
    save(tmp_path / "2", 2)
    monkeypatch.chdir(tmp_path / "2")  # a socket's path must be short
    content = Path(name).read_bytes()

    def bound(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)

    for put in (
        os.mkfifo,
        Path.mkdir,
        bound,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(name),
        lambda path: path.symlink_to("/nowhere"),
    ):
        claims.remove(tmp_path / "2" / name)
        put(tmp_path / "2" / name)
        with pytest.raises(ValueError, match=rf"2/{name} is damaged: it is not a reg|{name} is missing|has no {name}"):
            load(tmp_path / "2")
        with pytest.warns(UserWarning, match=name):
            assert ca.latest_checkpoint(tmp_path) == tmp_path / "1"
    claims.remove(tmp_path / "2" / name)
    (tmp_path / "elsewhere").write_bytes(content)
    (tmp_path / "2" / name).symlink_to(tmp_path / "elsewhere")  # the content is what counts
    assert load(tmp_path / "2") == 2
