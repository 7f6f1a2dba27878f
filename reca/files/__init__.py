"""The one layer through which every checkpoint, export and cache is written.

A file or folder written here appears whole or not at all, whatever kills the process; failures of the file
system are `DiskError`s; what is damaged later is refused by `verify_dir` and `read_safetensors`.
"""

from __future__ import annotations

from reca.files.atomic import copy_file, open_atomic, write_atomic, write_json, write_text
from reca.files.faults import CRASH_POINTS, at_crash_points
from reca.files.lines import JsonLines
from reca.files.lock import RunLock
from reca.files.publish import MANIFEST, publish_dir, remove_dir, sweep_staging, verify_dir
from reca.files.tensors import read_safetensors, write_safetensors

__all__ = [
    "CRASH_POINTS",
    "MANIFEST",
    "JsonLines",
    "RunLock",
    "at_crash_points",
    "copy_file",
    "open_atomic",
    "publish_dir",
    "read_safetensors",
    "remove_dir",
    "sweep_staging",
    "verify_dir",
    "write_atomic",
    "write_json",
    "write_safetensors",
    "write_text",
]
