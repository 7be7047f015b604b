"""The command line: parse, call one function, print; torch is imported when a command needs it."""

from sift_cli.cli.app import app, main

__all__ = ["app", "main"]
