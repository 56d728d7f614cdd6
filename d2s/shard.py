"""`python -m d2s.shard build | verify | stats | show | index`: the data before training. Needs no torch."""

from d2s.shards.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
