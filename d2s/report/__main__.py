"""Runs the command `python -m d2s.report`."""

from d2s.report.command import main

if __name__ == "__main__":
    raise SystemExit(main())
