"""The command line, called in the process of a test."""

import pytest

from shampoo3d.cli import commands


def called(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Call ``shampoo3d``; return its exit code, output and errors."""
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments.split())
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def check_refused(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that these arguments are answered by one line with these words."""
    code, _, err = called(arguments, capsys)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
