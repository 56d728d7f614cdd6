"""COCO's own captions_*.json files: one file a split; captions in the order of their annotation ids."""

from collections.abc import Iterator
from pathlib import Path

from d2s.common.files import read_json
from d2s.shards.format.sample import Entry, Faults, SourceOptions, field_fault, text_field, whole_field

NEEDS = ("captions", "images")


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Reads images[].{id, file_name} and annotations[].{id, image_id, caption} of each file.

    A file's split is the one it was given with (`val=FILE`), or stands in its name, or is `options.split`.
    """
    for split, path in options.captions:
        yield from _file(split or _split_of(path) or options.split, path, options.images, faults)


def _split_of(path: Path) -> str | None:
    return next((split for split in ("train", "val", "test") if split in path.stem), None)


def _file(split: str, path: Path, images: Path, faults: Faults) -> Iterator[Entry]:
    value = read_json(path)
    lists = value if isinstance(value, dict) else {}
    if not isinstance(lists.get("images"), list) or not isinstance(lists.get("annotations"), list):
        raise ValueError(f"{path}: no lists 'images' and 'annotations': this is not COCO's layout")
    captions: dict[int, list[tuple[int, str]]] = {}
    known: dict[int, str] = {}
    for number, image in enumerate(lists["images"]):
        where = f"{path}: images[{number}]"
        try:
            name, image_id = text_field(image, "file_name"), whole_field(image, "id")
            if image_id in known:
                faults.add(where, f"image id {image_id} stands here a second time", name)
                continue
            known[image_id] = name
        except (KeyError, TypeError) as error:
            faults.add(where, f"{field_fault(error)}; every image has id and file_name")
    for number, annotation in enumerate(lists["annotations"]):
        where = f"{path}: annotations[{number}]"
        try:
            image_id, caption = annotation["image_id"], (whole_field(annotation, "id"), annotation["caption"])
        except (KeyError, TypeError) as error:
            faults.add(where, f"{field_fault(error)}; every annotation has id, image_id and caption")
            continue
        if not isinstance(image_id, int) or isinstance(image_id, bool) or image_id not in known:
            faults.add(where, f"caption without an image: image_id {image_id!r} is not among the images")
            continue
        captions.setdefault(image_id, []).append(caption)
    for image_id, name in known.items():
        ordered = sorted(captions.get(image_id, []), key=lambda pair: pair[0])
        yield Entry(
            split=split,
            source_id=name,
            where=f"{path}: image {image_id}",
            sparse=tuple(caption for _, caption in ordered),
            image_id=image_id,
            path=str(_home(path, images, name) / name),
        )


def _home(captions: Path, images: Path, name: str) -> Path:
    """images/, or the folder in it that COCO's archives unpack to: val2014/, train2017/."""
    for part in (name.split("_")[1] if name.startswith("COCO_") else "", captions.stem.rsplit("_", 1)[-1]):
        if part and (images / part).is_dir():
            return images / part
    return images
