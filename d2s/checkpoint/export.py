"""The model folders that a run leaves, `best` and `last`: whole or not at all, and an error in one line."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from d2s.common.folders import replace_folder
from d2s.model import D2SModel


def write_model(folder: Path, model: D2SModel) -> None:
    """Puts the model's folder in the place of `folder`. Raises OSError where the disk does not take it.

    What was written until then is removed: it may be what fills the disk.
    """
    try:
        replace_folder(folder, model.save_pretrained)
    except OSError as error:
        if error.filename:
            raise
        # What fails in a write, not in an open, knows no name.
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
    except SafetensorError as error:  # how that library tells of a disk that is full
        raise OSError(0, str(error), str(folder)) from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        # The tokenizers library tells of it by the bare class, which nothing else raises.
        raise OSError(0, str(error), str(folder)) from error
    finally:
        shutil.rmtree(folder.with_name(f".{folder.name}.new"), ignore_errors=True)  # of replace_folder
