"""`python -m sift_cli` is `sift`."""

from sift_cli.cli import main

if __name__ == "__main__":
    main()
