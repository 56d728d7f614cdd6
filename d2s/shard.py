"""Builds and checks data sets: `python -m d2s.shard build | index | verify | stats | show`."""

from d2s.shards.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
