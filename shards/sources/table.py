"""One row an image, in JSON lines or parquet: path, sparse captions, dense captions, split, id."""

from collections.abc import Iterator

from d2s.shards.dense import files_of, read_rows, texts
from d2s.shards.sample import Entry, Faults, SourceOptions, field_fault, text_field

NEEDS = ("captions",)
_FIELDS = ("path", "sparse", "dense", "split", "id")


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Reads the rows of each file. Only `path` must be there; captions are a text or a list of texts.

    Paths are relative to `options.images` or else to the folder of the file. An integer `id` is the image id;
    any other becomes the key.
    """
    unknown = sorted(set(options.columns) - set(_FIELDS))
    if unknown:
        raise ValueError(f"--columns: {unknown[0]!r} is none of {', '.join(_FIELDS)}")
    column = {name: options.columns.get(name, name) for name in _FIELDS}
    for given, captions in options.captions:
        for file in files_of(captions):
            home = options.images or file.parent
            for where, row in read_rows(file, None, faults):
                try:
                    path = text_field(row, column["path"])
                except (KeyError, TypeError) as error:
                    faults.add(where, f"caption without an image: {field_fault(error)}")
                    continue
                number = row.get(column["id"])
                is_number = isinstance(number, int) and not isinstance(number, bool)
                yield Entry(
                    split=str(row.get(column["split"]) or given or options.split),
                    source_id=path,
                    where=where,
                    sparse=_captions(row, column["sparse"]),
                    dense=_captions(row, column["dense"]),
                    image_id=number if is_number else None,
                    key=None if is_number or number is None else str(number),
                    path=str(home / path),
                )


def _captions(row: dict, column: str) -> tuple:
    return () if row.get(column) is None else texts(row, (column,))
