"""Writes model folders atomically, such as `best` and `last` of a run."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from d2s.common.folders import replace_folder
from d2s.model import D2SModel


def write_model(folder: Path, model: D2SModel) -> None:
    """Writes the model to `folder`. If the folder exists, it is replaced.

    Raises OSError, with the name of the file or of `folder`, if the disk is full or cannot be written. In
    that case the unfinished new folder is removed, to free the disk.
    """
    try:
        replace_folder(folder, model.save_pretrained)
    except OSError as error:
        if error.filename:
            raise
        # If a write fails (not an open), the error does not contain the file's name.
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
    except Exception as error:
        # The tokenizers library raises the class Exception itself if the disk is full.
        if type(error) not in (Exception, SafetensorError):
            raise
        raise OSError(0, str(error), str(folder)) from error
    finally:
        shutil.rmtree(folder.with_name(f".{folder.name}.new"), ignore_errors=True)
