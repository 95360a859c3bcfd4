"""The command line: parse, call, print. Results go to stdout, progress and errors to stderr."""

from asesearch.cli.program import app, main

__all__ = ["app", "main"]
