"""One row an image, in JSON lines or parquet: path, sparse captions, dense captions, split, id."""

from collections.abc import Iterator

from d2s.shards.build.dense import files_of, read_rows, texts
from d2s.shards.format.sample import Entry, Faults, SourceOptions, caption_fault, field_fault, text_field

NEEDS = ("captions",)
_FIELDS = ("path", "sparse", "dense", "split", "id")


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Reads the rows of each file. Only `path` must be there; captions are a text or a list of texts.

    Paths are relative to `options.images` or else to the folder of the file. An integer `id` is the image id;
    any other becomes the key. A column that `options.columns` names has to be in every row, though it may be null.
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
                    number = _id(row, column["id"])
                except KeyError as error:
                    faults.add(where, f"caption without an image: {field_fault(error)}")
                    continue
                except TypeError as error:
                    faults.add(where, field_fault(error))
                    continue
                lacking = [name for name in options.columns.values() if name not in row]
                if lacking:
                    reason = (
                        f"no field {lacking[0]!r}, which --columns names; there are {', '.join(sorted(row))}"
                    )
                    faults.add(where, reason, path)
                    continue
                is_number = isinstance(number, int)
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


def _id(row: dict, column: str) -> int | float | str | None:
    value = row.get(column)
    if isinstance(value, (bool, list, dict)) or (isinstance(value, str) and caption_fault((value,))):
        raise TypeError(f"field {column!r} is {value!r}, neither a number nor a text")
    return value


def _captions(row: dict, column: str) -> tuple:
    return () if row.get(column) is None else texts(row, (column,))
