"""A run on disk: everything it needs to go on as if it had never stopped, and the weights alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fusedres.training import files

VERSION = 1
LAST, WEIGHTS = "last.pt", "model.safetensors"
# in a .safetensors: the metadata, as JSON, and the prefix of the normalisation's tensors
METADATA = "fusedres"
NORMALISATION = "normalisation."


class CheckpointError(ValueError):
    """A file that is no checkpoint of a run, or a damaged one; one line."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write what ``load`` reads; what was there before stays until the new file is whole.

    Raises:
        OSError: it can't be written; the file that was there is still there.
    """
    with files.atomic(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save({"version": VERSION, **state}, file)
        except RuntimeError as error:  # what torch makes of a write that fails
            reason = error.__context__
            raise reason if isinstance(reason, OSError) else OSError(str(error)) from error


def load(path: Path) -> dict[str, Any]:
    """What ``save`` wrote, on the CPU.

    Raises:
        CheckpointError: there is no such file, or it is no checkpoint of a run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise CheckpointError(
            f"{path} is damaged, or no checkpoint: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(state, dict) or "run" not in state or "optimizer" not in state:
        raise CheckpointError(f"{path} has weights, but no run to go on with")
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path} is of version {state.get('version')}, this fusedres reads {VERSION}")
    return state


def save_weights(path: Path, model: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """The weights alone, as safetensors.

    Args:
        path: the file.
        model: the state_dict.
        facts: "normalisation", kept as tensors of that prefix, and what JSON can say, kept as metadata, as
            one text: the order of several is not the same in every file.

    Raises:
        OSError: it can't be written; the file that was there is still there.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.items()}
    tensors |= {f"{NORMALISATION}{name}": value for name, value in facts["normalisation"].items()}
    others = {name: value for name, value in facts.items() if name != "normalisation"}
    metadata = {METADATA: json.dumps(others)}
    with files.atomic(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
