import errno
import os
import subprocess
import sys

import pytest

from paperlib.system import files
from paperlib.system.errors import UserError, run_command


def test_roots_do_not_depend_on_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("PAPERLIB_RUNS")
    before = files.runs_root()
    monkeypatch.chdir(tmp_path)
    assert files.runs_root() == before == files.ROOT / "runs"
    monkeypatch.setenv("PAPERLIB_DATA", "elsewhere")
    assert files.data_root() == files.ROOT / "elsewhere"
    monkeypatch.setenv("PAPERLIB_DATA", str(tmp_path))
    assert files.data_root() == tmp_path.resolve()
    monkeypatch.setenv("PAPERLIB_DATA", "~nobody-of-this-name/data")
    with pytest.raises(UserError, match="write the folder out"):
        files.data_root()


def test_replacing_writes_whole_files_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "file.json"
    for text in ("old", "newer"):
        with files.atomic_write(target) as partial:
            assert partial.parent == target.parent, "the move must not cross file systems"
            assert partial.suffix == ".json"
            partial.write_text(text)
        assert target.read_text() == text
    assert os.listdir(target.parent) == ["file.json"]


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EACCES, UserError, "cannot write .*file.txt: Permission denied; allow writing"),
        (errno.EROFS, UserError, "cannot write .*; allow writing"),
        (errno.ENOSPC, UserError, "no space left to write .*file.txt: free some"),
        (errno.EINTR, OSError, "Interrupted"),
    ],
)
def test_an_error_while_writing_keeps_the_old_file_and_is_explained(tmp_path, number, kind, message):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def failing():
        with files.atomic_write(target) as partial:
            partial.write_text("half of it")
            raise OSError(number, os.strerror(number))

    with pytest.raises(kind, match=message):
        failing()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_kill_while_writing_keeps_the_old_file(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    script = (
        "import os, signal, sys; from pathlib import Path; from paperlib.system import files\n"
        "with files.atomic_write(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(target)]).returncode == -9
    assert target.read_text() == "old"


@pytest.mark.parametrize(("raised", "code"), [(None, 0), (UserError("what to do"), 2), (KeyboardInterrupt(), 130)])
def test_run_command_exits_with_a_code(capsys, raised, code):
    def main():
        if raised:
            raise raised

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == code
    assert ("what to do" in capsys.readouterr().err) == (code == 2)


def test_where_the_file_system_has_no_locks_work_goes_on(tmp_path, monkeypatch, capsys):
    def missing(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.FileLock, "acquire", missing)
    with files.locked(tmp_path, "training"):
        assert (tmp_path / files.LOCK).read_text() == f"{os.getpid()}\n"
    assert capsys.readouterr().err == f"no locks on the file system of {tmp_path}: let no second process work there\n"


def without(*names):
    return {name: value for name, value in os.environ.items() if name not in names}


def test_what_a_shell_may_lack_or_cut_off_ends_in_no_traceback():
    """No home; a reader that stops after a line; and a number of processes without a rank."""
    python = [sys.executable, "-m"]
    options = {"cwd": files.ROOT, "stderr": subprocess.PIPE, "text": True}
    line = [*python, "paperlib.reproduce", "--list"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, env=without("HOME"), **options) as listing:
        listing.stdout.close()  # before a word was written
        assert (listing.stderr.read(), listing.wait()) == ("", 0)
    alone = without("RANK") | {"WORLD_SIZE": "2"}
    train = subprocess.run([*python, "paperlib.sequential", "--preset", "smoke"], env=alone, **options)
    assert train.returncode == 2 and "start by torchrun, or unset WORLD_SIZE" in train.stderr
    assert "Traceback" not in train.stderr
