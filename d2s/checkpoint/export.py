"""Writes the model folders of a run, `best` and `last`, atomically."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from d2s.common.folders import replace_folder
from d2s.model import D2SModel


def write_model(folder: Path, model: D2SModel) -> None:
    """Writes the model to `folder` and replaces an older one.

    Raises OSError, with the name of the file or of `folder`, if the disk is full or cannot be written. The
    unfinished folder is removed then, because it may be the reason why the disk is full.
    """
    try:
        replace_folder(folder, model.save_pretrained)
    except OSError as error:
        if error.filename:
            raise
        # The error of a failed write, unlike that of a failed open, does not contain the file's name.
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
    except Exception as error:
        # The tokenizers library raises the class Exception itself if the disk is full.
        if type(error) not in (Exception, SafetensorError):
            raise
        raise OSError(0, str(error), str(folder)) from error
    finally:
        shutil.rmtree(folder.with_name(f".{folder.name}.new"), ignore_errors=True)
