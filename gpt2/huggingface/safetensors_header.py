"""The header of a safetensors file: names, types and shapes of its tensors."""

from pathlib import Path

from ..config.parameter_shapes import Shapes
from ..errors import UserError
from ..untrusted.display import shown
from ..untrusted.parsing import MAX_FILE_BYTES, load_json

FLOATS = ("F64", "F32", "F16", "BF16")


def read_header(path: Path) -> tuple[Shapes, dict[str, str]]:
    """Reads (shape of each tensor, type of each tensor) by name.

    safetensors compares the header with the file; here it is only kept small and of the right form.

    Raises:
        UserError: the file is missing, or its header is damaged.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():  # opening a FIFO would wait for ever
            raise UserError(f"{path}: missing or damaged (not a file)")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_FILE_BYTES):
                raise UserError(f"{path}: missing or damaged (a header of {length:,} bytes)")
            header = load_json(file.read(length), f"{path}: missing or damaged", dict)
    except OSError as error:
        raise UserError(f"{path}: missing or damaged ({error.strerror or error})") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not isinstance(entry, dict) or not _is_shape(entry.get("shape")):
            raise UserError(f"{path}: missing or damaged ({shown(name)} has no shape)")
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes, {name: str(entry.get("dtype")) for name, entry in header.items()}


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
