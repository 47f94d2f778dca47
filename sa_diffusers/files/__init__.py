"""Files that are whole or not there: written beside, renamed into place, sealed with digests."""

from .folders import (
    finish_interrupted,
    is_interrupted,
    load_kept,
    new_folder,
    remade_folder,
    replacing_folder,
    set_aside,
    sweep,
)
from .sealed import digest_of, digests_of, read_record, read_sealed, resealed, write_record, write_sealed
from .single import (
    DamagedArtefact,
    Recorded,
    check_writable,
    disk_cause,
    read_json,
    write_bytes,
    write_json,
    write_text,
)

__all__ = [
    "DamagedArtefact",
    "Recorded",
    "check_writable",
    "digest_of",
    "digests_of",
    "disk_cause",
    "finish_interrupted",
    "is_interrupted",
    "load_kept",
    "new_folder",
    "read_json",
    "read_record",
    "read_sealed",
    "remade_folder",
    "replacing_folder",
    "resealed",
    "set_aside",
    "sweep",
    "write_bytes",
    "write_json",
    "write_record",
    "write_sealed",
    "write_text",
]
