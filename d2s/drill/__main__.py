"""Runs the command `python -m d2s.drill`."""

from d2s.drill.command import main

if __name__ == "__main__":
    raise SystemExit(main())
