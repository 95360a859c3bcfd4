"""Ctrl-C when it may end as another error, or comes twice: one line, exit code 130."""

import subprocess
import sys
import time
import weakref

import pytest
from typer.testing import CliRunner

from asesearch import cli
from asesearch.cli.interruption import (
    Interrupted,
    interruptible,
    interruptible_command,
    none_lost,
)
from asesearch.errors import StudyError


def amid(error):
    """A function that Ctrl-C interrupts, and whose tidying up fails with another error."""

    def run(*_, **__):
        try:
            raise KeyboardInterrupt
        finally:
            raise error

    return run


ERRORS = [
    StudyError("the study's storage can't be used: database is locked"),
    RuntimeError("cannot release un-acquired lock"),
    AssertionError(),
    SystemExit(1),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_an_error_that_ctrl_c_led_to_is_ctrl_c(monkeypatch, error):
    monkeypatch.setattr("asesearch.study.Study.open", amid(error))
    result = CliRunner().invoke(cli.app, ["report", "nowhere"])
    assert result.exit_code == 130 and result.stdout == ""
    begun = "interrupted: its work had not begun; give the same command again\n"
    assert result.stderr == begun


def test_an_error_that_it_did_not_lead_to_is_none():
    with pytest.raises(StudyError), interruptible("nothing"):
        raise StudyError("no study in nowhere")
    with pytest.raises(StudyError), interruptible("nothing"):
        raise StudyError("no study in nowhere") from ValueError()


def test_it_is_answered_once_by_the_innermost(capsys):
    with pytest.raises(SystemExit), interruptible("outer"), interruptible(lambda: "inner"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "interrupted: inner\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StudyError("locked")], ids=["^C", "error"])
def test_where_what_is_kept_can_t_be_found_out_the_line_is_shorter(capsys, error):
    """A second Ctrl-C while the study is read, or one that is locked."""

    def kept():
        raise error

    with pytest.raises(Interrupted) as caught, interruptible(kept):
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted: give the same command again\n"


def test_it_is_not_lost_amid_what_nobody_called(capsys):
    """Python throws away what is raised in the callback of a weak reference, as SQLAlchemy's."""

    def callback(_):
        raise KeyboardInterrupt

    told = sys.unraisablehook
    with pytest.raises(Interrupted), interruptible("kept"), none_lost():
        thing = Interrupted()
        reference = weakref.ref(thing, callback)
        del thing
        for _ in range(500):  # not one sleep, which a signal to another thread would not end
            time.sleep(0.01)
        pytest.fail(f"went on after Ctrl-C, {reference}")
    assert capsys.readouterr().err == "interrupted: kept\n"
    assert sys.unraisablehook is told


class Failing:
    """Fails with an error when it is freed."""

    def __init__(self, error):
        self.error = error

    def __del__(self):
        raise self.error


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_what_fails_while_ctrl_c_passes_is_no_second_one(monkeypatch, again):
    begun, told = [], []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr("_thread.start_new_thread", lambda *_: begun.append(1))
    error = KeyboardInterrupt() if again else ValueError()
    with pytest.raises(KeyboardInterrupt), none_lost():
        thing = Failing(error)
        try:
            raise KeyboardInterrupt
        finally:
            del thing
    assert len(begun) == again and len(told) == (not again)


def test_another_error_there_is_told_as_ever(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    def callback(_):
        raise ValueError

    with none_lost():
        thing = Interrupted()
        reference = weakref.ref(thing, callback)
        del thing
    assert reference() is None and [type(t.exc_value) for t in told] == [ValueError]


def test_after_its_work_a_command_does_not_say_that_it_had_not_begun(capsys):
    with pytest.raises(Interrupted), interruptible_command():
        with interruptible("kept"):
            pass
        raise KeyboardInterrupt
    with pytest.raises(Interrupted), interruptible_command():
        raise KeyboardInterrupt
    done, not_begun = capsys.readouterr().err.splitlines()
    assert done == "interrupted: its work was done, and only what it prints may be missing"
    assert not_begun == "interrupted: its work had not begun; give the same command again"


def test_before_the_command_line_is_read(monkeypatch, capsys):
    def parse(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["asesearch", "report", "nowhere"])
    monkeypatch.setattr("typer.core.TyperGroup.parse_args", parse)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted: give the same command again\n"


@pytest.mark.parametrize("body", ["raise KeyboardInterrupt", "exec('raise KeyboardInterrupt')"])
def test_while_modules_load(tmp_path, body):
    """Libraries run text as code while they load, and Python then wants to die of the signal."""
    (tmp_path / "typer.py").write_text(body)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import asesearch.cli as c; c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr == "interrupted: give the same command again\n"


def test_a_working_directory_that_is_gone_is_told_before_anything_loads(tmp_path):
    code = (
        "import os, sys; from asesearch.cli import main; os.rmdir(os.getcwd())\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "gone",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "False\n")
    assert done.stderr == "error: the working directory no longer exists; cd to one that does\n"
