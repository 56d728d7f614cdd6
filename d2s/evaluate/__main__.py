"""Runs the command `python -m d2s.evaluate`."""

from d2s.evaluate.command import main

if __name__ == "__main__":
    raise SystemExit(main())
