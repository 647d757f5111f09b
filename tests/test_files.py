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


def test_replacing_writes_whole_files_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "file.json"
    for text in ("old", "newer"):
        with files.atomic_write(target) as partial:
            assert partial.parent == target.parent, "the move must not cross file systems"
            assert partial.suffix == ".json"
            partial.write_text(text)
        assert target.read_text() == text
    assert os.listdir(target.parent) == ["file.json"]


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError), files.atomic_write(target) as partial:
        partial.write_text("half of it \ud800")
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


def test_a_full_disk_is_said_in_one_line(tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: the write fails at the limit."""
    target = tmp_path / "big.bin"
    target.write_bytes(b"old")
    script = (
        "import resource, signal, sys; from pathlib import Path; from paperlib.system import errors, files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "def main():\n"
        "    with files.atomic_write(Path(sys.argv[1])) as partial:\n"
        "        partial.write_bytes(b'x' * 5000)\n"
        "errors.run_command(main)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "no space left" in run.stderr
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["big.bin"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path, number):
    with pytest.raises(UserError, match="cannot write"), files.atomic_write(tmp_path / "file.txt"):
        raise OSError(number, os.strerror(number))


def test_a_file_in_place_of_a_folder_is_said_in_one_line(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        files.make_folder(tmp_path / "runs" / "deeper")


def test_other_system_errors_are_not_disguised(tmp_path):
    with pytest.raises(OSError, match="Interrupted"), files.atomic_write(tmp_path / "file.txt"):
        raise OSError(errno.EINTR, "Interrupted")


@pytest.mark.parametrize(("raised", "code"), [(None, 0), (UserError("what to do"), 2), (KeyboardInterrupt(), 130)])
def test_run_command_exits_with_a_code(capsys, raised, code):
    def main():
        if raised:
            raise raised

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == code
    assert ("what to do" in capsys.readouterr().err) == (code == 2)


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path / "metrics.json").write_text('{"claims": ')
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        files.load_json(tmp_path / "metrics.json")
