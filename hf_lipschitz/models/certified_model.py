"""What every model of this library adds to ``PreTrainedModel``: a certificate in every folder it is saved to."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file

from hf_lipschitz.bounds import strict_json
from hf_lipschitz.bounds.certificate import FILE_NAME, Certificate
from hf_lipschitz.bounds.check import Report, compare
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.program import Program
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.bounds.weights import INDEX, SINGLE
from hf_lipschitz.certify import own_program, state_arrays, write_certificate
from hf_lipschitz.remote_code import AUTO_MAP, write_remote_file


class UncertifiedWarning(UserWarning):
    """A model that is not, or no longer, the one a certificate speaks of; the message says why."""


class CertifiedModel(PreTrainedModel):
    """Base of all models here: ``save_pretrained`` writes the certificate of exactly the tensors it wrote."""

    _certified_folder: Path | None = None
    _uncertified_reason: str = "it was not loaded from, or saved to, a folder with a certificate"

    def bound_program(self) -> Program:
        """The bound program of this class and config."""
        raise KernelError(f"{type(self).__name__} states no bound program")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: the thin remote-code file serves instead of copies of this package's source."""

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of exactly the weights in memory, or None with an ``UncertifiedWarning`` that says why.

        The bound is re-derived from the stored weights, every stored tensor is compared, bit for bit, with the one in
        memory, and the layers with the program, so a cast, quantised, resized, merged, rebuilt or further trained model
        has none. Costs what certifying costs.
        """
        try:
            return self._checked_certificate()
        except ValueError as error:
            warnings.warn(f"this model has no certificate: {error}", UncertifiedWarning, stacklevel=2)
            return None

    def _checked_certificate(self) -> Certificate:
        if self._certified_folder is None:
            raise KernelError(self._uncertified_reason)
        certificate, stored = _certified_tensors(self._certified_folder)
        state = self.state_dict()
        if set(state) != set(stored):
            raise KernelError(
                f"its tensors are not those of the certified file: {sorted(set(state) ^ set(stored))[:3]}"
            )
        for name, tensor in state.items():
            if tensor.dtype != stored[name].dtype:
                raise KernelError(
                    f"tensor {name!r} is {tensor.dtype}, certified as {stored[name].dtype}: certify the cast copy"
                )
            if tensor.shape != stored[name].shape or not torch.equal(_bits(tensor), _bits(stored[name])):
                raise KernelError(
                    f"tensor {name!r} has changed since it was certified: save the model to certify it anew"
                )
        if own_program(type(self))(self).canonical_bytes() != certificate.program.canonical_bytes():
            raise KernelError(
                "its layers are not those that the certificate describes: save the model to certify it anew"
            )
        compare(report := Report(), certificate, state_arrays(self), BUILT_IN)  # re-derived, not believed
        if report.reasons:
            raise KernelError(f"the certificate claims too much: {report.reasons[0]}")
        return certificate

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers; also writes the thin remote-code file and the certificate of the tensors just written.

        Where the weights cannot be certified (NaN, foreign tensors, a process that only takes part in a distributed
        save) the folder gets no certificate, a stale one is removed, and an ``UncertifiedWarning`` says why.
        """
        folder, main = Path(save_directory), kwargs.get("is_main_process", args[0] if args else True)
        self.config.auto_map = dict(AUTO_MAP)
        if main and folder.is_dir():
            (folder / FILE_NAME).unlink(missing_ok=True)
            (folder / INDEX).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **kwargs)
        if main and folder.is_dir() and not (folder / FILE_NAME).exists():
            self._write_extras(folder)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which saves into a temporary folder: the model goes on with the certificate it had."""
        before = self._certified_folder, self._uncertified_reason
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self._certified_folder, self._uncertified_reason = before

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """transformers uploads from inside ``save_pretrained``: the certificate must be there before."""
        self._write_extras(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # pyright: ignore

    def _write_extras(self, folder: Path) -> None:
        write_remote_file(folder)
        if (
            folder / INDEX
        ).exists():  # of this save: transformers would go on loading the single file of an earlier one
            (folder / SINGLE).unlink(missing_ok=True)
        try:
            write_certificate(folder)
        except ValueError as error:
            self._certified_folder, self._uncertified_reason = None, str(error)
            warnings.warn(f"{folder} was saved without a certificate: {error}", UncertifiedWarning, stacklevel=4)
        else:
            self._certified_folder = folder.resolve()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; remembers the certificate of the folder or repository, or warns why it does not apply."""
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        hub = {k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only", "subfolder") if k in kwargs}
        model._remember(pretrained_model_name_or_path, info, hub)
        return (model, info) if wants_info else model

    def _remember(self, source: Any, info: dict[str, Any], hub: dict[str, Any]) -> None:
        path = (
            cached_file(
                source,
                FILE_NAME,
                **hub,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            if source is not None
            else None
        )
        if path is None:
            return
        changed = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)]
        if changed:
            self._uncertified_reason = f"tensors differ from the certified file ({', '.join(changed)})"
        elif getattr(self, "hf_quantizer", None) is not None:
            self._uncertified_reason = "it was quantised on loading"
        else:
            self._certified_folder = Path(path).parent
            self._uncertified_reason = ""
            return
        warnings.warn(
            f"the certificate of {source} does not cover this model: {self._uncertified_reason}",
            UncertifiedWarning,
            stacklevel=3,
        )


def _certified_tensors(folder: Path) -> tuple[Certificate, dict[str, torch.Tensor]]:
    """The certificate of a folder and the tensors that it covers; files may be links, as in the cache of the Hub."""
    certificate = Certificate.from_bytes(strict_json.read_bytes((folder / FILE_NAME).resolve()))
    stored: dict[str, torch.Tensor] = {}
    for name, digest in certificate.files.items():
        path = (folder / name).resolve()
        if not path.is_file() or _sha256(path) != digest:
            raise KernelError(f"{name} in {folder.name} is not the file that was certified: save the model again")
        if name.endswith(".safetensors"):
            stored.update(load_file(path))
    return certificate, stored


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
