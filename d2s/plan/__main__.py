"""Runs the command `python -m d2s.plan`."""

from d2s.plan.command import main

if __name__ == "__main__":
    raise SystemExit(main())
