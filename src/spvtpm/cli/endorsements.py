"""Shows a vTPM's EK certificates, and writes them to files; for every command that fetches some."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spvtpm.cli.parts import print_json
from spvtpm.wire.errors import StorageError
from spvtpm.wire.messages import Endorsement

Output = Annotated[
    Path | None,
    Parameter(name="--output", help="Write the certificates there, as PEM: one file for each, and chain.pem."),
]


def show_endorsement(endorsement: Endorsement, *, json: bool, output: Path | None) -> None:
    """Prints the certificates, or what was written where.

    Raises:
        CertificateError: one of them is none.
        AlreadyExists, StorageError: a file is there already, or cannot be written.
    """
    from spvtpm.files import PUBLIC, create_file
    from spvtpm.wire.endorsement_certificates import parse_ek_certificate

    pems = {"chain": "".join(map(ssl.DER_cert_to_PEM_cert, endorsement.issuer))}
    for der in endorsement.certificates:
        pems[parse_ek_certificate(der).template.name.lower().replace(" ", "-")] = ssl.DER_cert_to_PEM_cert(der)
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot use {output}: {error.strerror}") from None
        for name, pem in pems.items():
            create_file(output / f"{name}.pem", pem.encode(), PUBLIC)
    if json:
        print_json(endorsement)
        return
    print(
        f"vTPM {endorsement.vtpm_id}: {len(endorsement.certificates)} EK certificates, and the chain of the chip that made it"
    )
    for name, pem in pems.items():
        print(pem if output is None else f"  {output / name}.pem", end="" if output is None else "\n")
