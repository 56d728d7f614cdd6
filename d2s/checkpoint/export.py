"""The model folders of a run, `best` and `last`: written atomically."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from d2s.common.folders import replace_folder
from d2s.model import D2SModel


def write_model(folder: Path, model: D2SModel) -> None:
    """Write the model to `folder`, in place of an older one.

    Raises OSError with a file's or the folder's name if the disk is full or cannot be written; the unfinished folder
    is removed then, as it may be what fills the disk.
    """
    try:
        replace_folder(folder, model.save_pretrained)
    except OSError as error:
        if error.filename:
            raise
        # A failed write, unlike a failed open, does not know the file's name.
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
    except SafetensorError as error:
        raise OSError(0, str(error), str(folder)) from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        # The tokenizers library raises the class Exception itself if the disk is full.
        raise OSError(0, str(error), str(folder)) from error
    finally:
        shutil.rmtree(folder.with_name(f".{folder.name}.new"), ignore_errors=True)
