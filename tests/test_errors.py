"""What is told of an error of another library."""

import pytest

from asesearch.errors import first_line, in_one_line


@pytest.mark.parametrize("text", ["", "\n", " \n\t"])
def test_an_error_that_says_nothing_is_told_by_its_class(text):
    for told in (in_one_line, first_line):
        assert told(RuntimeError(text)) == "RuntimeError"
    assert in_one_line(MemoryError()) == first_line(MemoryError()) == "MemoryError"


def test_an_error_is_told_in_one_line_of_some_length():
    error = RuntimeError("\n  no such\tkernel\nhere\n\nC++ CapturedTraceback: …")
    assert in_one_line(error) == "no such kernel here C++ CapturedTraceback: …"
    assert first_line(error) == "no such\tkernel"
    assert in_one_line(error, 7) == first_line(error, 7) == "no such"
    assert len(in_one_line(ValueError("a " * 1000))) == 300
