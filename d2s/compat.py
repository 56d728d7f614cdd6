"""`python -m d2s.compat CHECKPOINT --out DIR`: imports a checkpoint of the authors' release."""

from d2s.model.release_importer import main

if __name__ == "__main__":
    raise SystemExit(main())
