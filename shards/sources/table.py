"""JSON lines or parquet with one image in each row: path, sparse captions, dense captions, split, id."""

from collections.abc import Iterator

from d2s.shards.sources.caption_files import captions_of, list_files, read_rows
from d2s.shards.sources.entry import Entry, SourceOptions
from d2s.shards.sources.faults import Faults, caption_fault, field_fault, text_field

NEEDS = ("captions",)
USES = ("images", "split", "columns")
_FIELDS = ("path", "sparse", "dense", "split", "id")


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Reads the rows of each file. Only `path` must be there; captions are a text or a list of texts.

    Paths are relative to `options.images`, or else to the folder of the file. An integer `id` is the image id;
    any other `id` becomes the key. A column named by `options.columns` must be in every row, but may be null.
    """
    unknown = sorted(set(options.columns) - set(_FIELDS))
    if unknown:
        raise ValueError(f"--columns: {unknown[0]!r} is none of {', '.join(_FIELDS)}")
    column = {name: options.columns.get(name, name) for name in _FIELDS}
    for given, captions in options.captions:
        for file in list_files(captions):
            home = options.images or file.parent
            for where, row in read_rows(file, None, faults):
                try:
                    path = text_field(row, column["path"])
                    number = _id_field(row, column["id"])
                except KeyError as error:
                    faults.add(where, f"caption without an image: {field_fault(error)}")
                    continue
                except TypeError as error:
                    faults.add(where, field_fault(error))
                    continue
                missing = [name for name in options.columns.values() if name not in row]
                if missing:
                    there = f"there are {', '.join(sorted(row))}"
                    faults.add(where, f"no field {missing[0]!r}, which --columns names; {there}", path)
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


def _id_field(row: dict, column: str) -> int | float | str | None:
    value = row.get(column)
    if isinstance(value, (bool, list, dict)) or (isinstance(value, str) and caption_fault((value,))):
        raise TypeError(f"field {column!r} is {value!r}, neither a number nor a text")
    return value


def _captions(row: dict, column: str) -> tuple:
    return () if row.get(column) is None else captions_of(row, (column,))
