"""Which files of a folder make a checkpoint that may be published, and what forbids publishing it.

This looks at names and digests only; whether the certificate's claim is true is for the verifier to say. It needs the
standard library alone.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_lipschitz.errors import UserError

CONFIG_FILE = "config.json"
CERTIFICATE_FILE = "lipschitz_certificate.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
REMOTE_CODE_FILE = "hf_lipschitz_remote.py"

# What the Trainer and git leave in a folder: never part of a checkpoint. Matched against every part of a path.
_LEFTOVERS = (
    *("checkpoint-*", "runs", ".git*", ".cache", "__pycache__", "*.lock"),
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "trainer_state.json"),
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_FOREIGN_WEIGHTS = (*PICKLE_SUFFIXES, ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack", ".gguf")
_TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin", "rng_state*.pth")


class CheckpointError(UserError):
    """A folder or repository does not hold what it must; the message names the file and says what to do."""


def checkpoint_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The files of a checkpoint that may be pushed, by their name in the repository.

    The folder must hold config.json, safetensors weights (all shards), and a lipschitz_certificate.json whose sha256
    digests are those of the files; it must hold no pickle, no Python file but `hf_lipschitz_remote.py`, and no symlink.

    Raises:
        UserError: there is no such folder.
        CheckpointError: the first thing that is wrong, in one sentence.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"'{root}' is not a folder: give the folder that save_pretrained wrote.")
    files = dict(sorted(_walk(root, root)))
    for name in files:
        if name.lower().endswith(PICKLE_SUFFIXES):
            raise CheckpointError(f"'{name}' is a pickle, which can run code when it is loaded: remove it from {root}.")
        if name.endswith(".py") and name != REMOTE_CODE_FILE:
            raise CheckpointError(f"'{name}' is code, which a certificate cannot cover: remove it from {root}.")
    for name in (CONFIG_FILE, CERTIFICATE_FILE):
        if name not in files:
            raise CheckpointError(f"There is no {name} in {root}: save the model with save_pretrained, then push.")
    weights = _weight_files(root, files)
    digests = certified_digests(files)
    for name in (CONFIG_FILE, *weights, *(name for name in files if name.endswith(".safetensors"))):
        if name not in digests:
            raise CheckpointError(
                f"The certificate in {root} does not cover '{name}': remove the file or certify again."
            )
    for name, expected in digests.items():
        if name not in files:
            raise CheckpointError(f"The certificate in {root} is of a file '{name}' that is not there: certify again.")
        if _sha256(files[name]) != expected:
            raise CheckpointError(f"'{name}' in {root} is not the file that was certified: certify the folder again.")
    return files


def _walk(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """(name in the repository, path) of all files but leftovers; a symlink is refused before it is followed."""
    for path in folder.iterdir():
        if matches(path.name, _LEFTOVERS):
            continue
        if path.is_symlink():
            raise CheckpointError(f"'{path}' is a symbolic link: replace it by the file itself.")
        if path.is_dir():
            yield from _walk(root, path)
        else:
            yield path.relative_to(root).as_posix(), path


def findings(folder: Path) -> tuple[list[str], list[str]]:
    """What a verifier must refuse in a folder, and what it should mention; one sentence each. Nothing is opened.

    Refused: symbolic links, code that is not the thin file, pickles and other formats that may run code or shadow
    the weights, and adapters (transformers would load them on top). Mentioned: training state.
    """
    refused: list[str] = []
    notes: list[str] = []
    for directory, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(directory) / name
            shown = path.relative_to(folder).as_posix()
            if path.is_symlink():
                refused.append(f"{shown}: a symbolic link; a checkpoint holds plain files only")
            elif name in files and matches(name, _TRAINING_STATE):
                notes.append(f"{shown}: training state (a pickle), not read and not covered")
            elif name in files and name.lower().endswith(_FOREIGN_WEIGHTS):
                refused.append(f"{shown}: may run code or shadow the weights when loaded; keep safetensors only")
            elif name in files and name.endswith((".py", ".pyc", ".so")) and name != REMOTE_CODE_FILE:
                refused.append(f"{shown}: code that is not the published {REMOTE_CODE_FILE}; it was not run")
            elif shown == "adapter_config.json":
                refused.append(
                    f"{shown}: transformers would load an adapter on top of the certified weights; remove it"
                )
    return refused, notes


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name fits one of the shell patterns (case counts)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _weight_files(root: Path, files: dict[str, Path]) -> list[str]:
    """Names of the weight files: the single one, or the index and its shards."""
    if WEIGHTS_FILE in files:
        if WEIGHTS_INDEX_FILE in files:
            raise CheckpointError(
                f"{root} holds {WEIGHTS_FILE} and the index of an older, sharded save: remove the index."
            )
        return [WEIGHTS_FILE]
    if WEIGHTS_INDEX_FILE not in files:
        raise CheckpointError(f"There is no {WEIGHTS_FILE} in {root}: save the model with save_pretrained, then push.")
    shards = _json_object(files[WEIGHTS_INDEX_FILE], "weight_map")
    for shard in shards.values():
        if shard not in files:
            raise CheckpointError(
                f"{WEIGHTS_INDEX_FILE} in {root} names a shard '{shard}' that is not there: save again."
            )
    return sorted(set(shards.values()))


def certified_digests(files: dict[str, Path]) -> dict[str, str]:
    """sha256 of each file that the certificate is of."""
    return dict(_json_object(files[CERTIFICATE_FILE], "digests", "files"))


def _json_object(path: Path, *keys: str) -> dict[str, Any]:
    """The object found in a JSON file by following the keys."""
    try:
        value = json.loads(path.read_bytes())
        for key in keys:
            value = value[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' is damaged or has no {'.'.join(keys)}: save and certify the model again.")
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
