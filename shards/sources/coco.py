"""Reads COCO's own captions_*.json files, one for each split. Captions are ordered by annotation id."""

import sys
from collections.abc import Iterator
from pathlib import Path

from d2s.shards.format.keys import SPLIT_ORDER
from d2s.shards.sources.caption_files import remedy
from d2s.shards.sources.coco_names import find_image
from d2s.shards.sources.entry import Entry, SourceOptions
from d2s.shards.sources.faults import Faults, field_fault, integer_field, is_integer, text_field
from d2s.shards.sources.text_files import plain_name, read_json_file

NEEDS = ("captions", "images")
USES = ("split",)


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Yields entries from each file's images[].{id, file_name} and annotations[].{id, image_id, caption}.

    The split of a file comes from `val=FILE`, else from --split, else from the file's name, else it is train.
    """
    for split, path in options.captions:
        named = next((name for name in SPLIT_ORDER if name in path.stem), None)
        split = split or options.forced_split or named or options.split
        yield from _entries_of_file(split, path, options.images, faults)


def _entries_of_file(split: str, path: Path, images: Path, faults: Faults) -> Iterator[Entry]:
    value = read_json_file(path, remedy)
    lists = value if isinstance(value, dict) else {}
    if not isinstance(lists.get("images"), list) or not isinstance(lists.get("annotations"), list):
        raise ValueError(
            f"{path}: no lists 'images' and 'annotations': this is not COCO's layout{remedy(path, value)}"
        )
    names = _file_names(path, lists["images"], faults)
    captions: dict[int, list[tuple[int, str]]] = {}
    known: dict[int, tuple] = {}
    repeated: list[str] = []
    for place, annotation in enumerate(lists["annotations"]):
        where = f"{path}: annotations[{place}]"
        try:
            image_id = annotation["image_id"]
            caption = (integer_field(annotation, "id"), annotation["caption"])
        except (KeyError, TypeError) as error:
            faults.add(where, f"{field_fault(error)}; every annotation has id, image_id and caption")
            continue
        if not is_integer(image_id) or image_id not in names:
            faults.add(where, f"caption without an image: image_id {image_id!r} is not among the images")
            continue
        number, text = caption
        if number not in known:
            known[number] = (image_id, text)
            captions.setdefault(image_id, []).append(caption)
        elif known[number] == (image_id, text):
            repeated.append(where)
        else:
            faults.add(
                where, f"annotation id {number} stands here a second time, with another caption or image"
            )
    if repeated:
        print(
            f"{len(repeated):,} annotations stand there twice; each is taken once (first: {repeated[0]})",
            file=sys.stderr,
        )
    for image_id, name in names.items():
        ordered = sorted(captions.get(image_id, []), key=lambda pair: pair[0])
        yield Entry(
            split=split,
            source_id=name,
            where=f"{path}: image {image_id}",
            sparse=tuple(caption for _, caption in ordered),
            image_id=image_id,
            path=str(find_image(_folder_of(path, images, name) / name, images)),
        )


def _file_names(path: Path, images: list, faults: Faults) -> dict[int, str]:
    """Maps each image id to its file name. Unusable images go to `faults`."""
    names: dict[int, str] = {}
    for number, image in enumerate(images):
        where = f"{path}: images[{number}]"
        try:
            name, image_id = text_field(image, "file_name"), integer_field(image, "id")
        except (KeyError, TypeError) as error:
            faults.add(where, f"{field_fault(error)}; every image has id and file_name")
            continue
        if image_id in names:
            faults.add(where, f"image id {image_id} stands here a second time", name)
        else:
            names[image_id] = name
    return names


def _folder_of(captions: Path, images: Path, name: str) -> Path:
    """Returns the subfolder that COCO's archives create (such as val2014) if it exists, else `images`."""
    for part in (
        name.split("_")[1] if name.startswith("COCO_") else "",
        plain_name(captions).removesuffix(".json").rsplit("_", 1)[-1],
    ):
        if part and (images / part).is_dir():
            return images / part
    return images
