"""The command line: parse, call one function, print. No command imports torch before it needs it."""

from sift_cli.cli.app import app, main

__all__ = ["app", "main"]
