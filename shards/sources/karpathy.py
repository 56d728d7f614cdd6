"""Reads Karpathy's JSON file, which has the captions and splits of Flickr8k, Flickr30K or COCO."""

from collections.abc import Iterator

from d2s.shards.sources.caption_files import remedy
from d2s.shards.sources.coco_names import find_image
from d2s.shards.sources.entry import Entry, SourceOptions
from d2s.shards.sources.faults import Faults, field_fault, text_field
from d2s.shards.sources.json_files import layout_of
from d2s.shards.sources.text_files import read_json_file

NEEDS = ("captions", "images")
USES = ()
# `restval` contains COCO validation images that papers have used for training since 2014.
_SPLITS = {"restval": "train"}


def entries(options: SourceOptions, faults: Faults) -> Iterator[Entry]:
    """Yields entries from images[].{filename, filepath?, split, cocoid|imgid, sentences[].raw}."""
    path = options.caption_file
    value = read_json_file(path, remedy)
    if not isinstance(value, dict) or not isinstance(value.get("images"), list):
        raise ValueError(f"{path}: no list 'images': this is not Karpathy's layout{remedy(path, value)}")
    if layout_of(value) == ("COCO", "coco"):
        raise ValueError(f"{path}: its images have no sentences{remedy(path, value)}")
    for number, image in enumerate(value["images"]):
        where = f"{path}: images[{number}]"
        try:
            name, split = text_field(image, "filename"), text_field(image, "split")
            sparse = tuple(sentence["raw"] for sentence in image["sentences"])
        except (KeyError, TypeError) as error:
            faults.add(where, f"{field_fault(error)}; every image has filename, split and sentences[].raw")
            continue
        folder = options.images / str(image.get("filepath") or "")
        # COCO's images are often unpacked into one folder, without the subfolder that `filepath` names.
        home = folder if folder.is_dir() else options.images
        yield Entry(
            split=_SPLITS.get(split, split),
            source_id=name,
            where=where,
            sparse=sparse,
            image_id=image.get("cocoid", image.get("imgid")),
            path=str(find_image(home / name, options.images)),
        )
