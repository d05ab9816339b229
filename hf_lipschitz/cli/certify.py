"""`hf-lipschitz certify`: bound a folder's Lipschitz constant and write the certificate beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_lipschitz.cli.output import JsonOption, complain, print_json, quiet_transformers, result, working
from hf_lipschitz.errors import UserError


def certify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder: config.json and safetensors weights.")],
    norm: Annotated[
        Literal["l2", "token_max"],
        typer.Option(help="l2: all entries of the input together. token_max: every token may move at once."),
    ] = "l2",
    as_json: JsonOption = False,
) -> None:
    """Prove a Lipschitz bound of the stored weights and write lipschitz_certificate.json into the folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a saved checkpoint")
    from hf_lipschitz.bounds.certificate import FILE_NAME
    from hf_lipschitz.certify import write_certificate

    with working():
        quiet_transformers()
        try:
            certificate = write_certificate(folder, norm=norm)
        except (ValueError, OSError) as error:  # whatever is wrong, it is in the folder
            complain(f"{folder} cannot be certified: {error}")
            raise typer.Exit(1) from None
    if as_json:
        print_json(_summary(folder / FILE_NAME, certificate))
        return
    from hf_lipschitz.verdict import bound_text

    result(f"wrote {folder / FILE_NAME}")
    result(f"  {bound_text(certificate.bound)}")
    result(f"  {bound_text(certificate.bound_features)}")


def _summary(path: Path, certificate: Any) -> dict[str, Any]:
    return {
        "certificate": str(path),
        "bound": certificate.bound.to_json(),
        "bound_features": certificate.bound_features.to_json(),
        "rounding_dtypes": sorted(certificate.rounding),
        "matrices": len(certificate.matrices),
        "files": dict(certificate.files),
    }
