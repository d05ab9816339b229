"""How fast norms are certified and verified, against float64 ``torch.linalg.svdvals`` over the same matrices.

Medians of ``--repeats`` runs that alternate between what is compared, ratios within one process; under five minutes on
two idle cores. Unset what steers the BLAS, so that it is the one that users meet::

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python benchmarks/bounds.py

Parts (``--parts``): ``vit`` samples ``--layers`` of the 12 layers of a ViT-B (each 4 of 768 x 768 and 2 of 768 x 3072,
float32 Gaussian), ``orthogonal`` as many pairs of the 80 near-orthogonal 1024 x 1024 matrices of a LipViT-base,
``convolution`` bounds two 3 x 3 kernels of 256 channels, one with independent entries and one whose taps are smooth,
and compares with the SVDs of the 1,024 frequencies of a 32 x 32 grid, of which ``--frequencies`` are timed; ``folder``
verifies a LipViT-base of 4 x ``--layers`` layers end to end, in fresh processes, against reading and hashing it;
``evaluation`` certifies batches of images against the plain float64 forward.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.rules.convolution_norm import convolution_norm_upper
from hf_lipschitz.bounds.spectral import spectral_norm_upper

STEERING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
GRID = 32 * 32
READ = (
    "import hashlib, pathlib, sys\n"
    "for path in sorted(pathlib.Path(sys.argv[1]).glob('*.safetensors')): hashlib.sha256(path.read_bytes()).hexdigest()"
)
VERIFY = "import sys; from hf_lipschitz import verify; assert verify(sys.argv[1], require='bound')"
IMPORT = "import hf_lipschitz.bounds.check"
# the peak that getrusage reports is at least that of the process that started this one; this one is the process's own
PEAK = "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def medians(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each function; runs alternate, and the first round warms up."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def row(what: str, seconds: float, against: float, aim: str, note: str) -> None:
    """Print one row of the table: the ratio is to the row's own baseline."""
    print(f"| {what} | {seconds:.3f} | {against:.3f} | {seconds / against:.3f} | {aim} | {note} |", flush=True)


def dense(name: str, matrices: list[Array], aims: tuple[str, str], repeats: int) -> None:
    """Rows of certifying and verifying matrices, with the largest excess over the SVD."""
    tensors = [torch.from_numpy(matrix).double() for matrix in matrices]
    bounds = [spectral_norm_upper(matrix) for matrix in matrices]
    sigma = [float(torch.linalg.svdvals(tensor)[0]) for tensor in tensors]
    excess = max(bound.value / s - 1.0 for bound, s in zip(bounds, sigma, strict=True))
    witnesses = [bound.witness for bound in bounds]
    svd, certify, verify = medians(
        (
            lambda: [torch.linalg.svdvals(tensor) for tensor in tensors],
            lambda: [spectral_norm_upper(matrix) for matrix in matrices],
            lambda: [spectral_norm_upper(m, witness=w) for m, w in zip(matrices, witnesses, strict=True)],
        ),
        repeats,
    )
    note = f"{len(matrices)} matrices, {bounds[0].method}, excess {excess:.1e}"
    row(f"{name}: certify", certify, svd, aims[0], note)
    row(f"{name}: verify", verify, svd, aims[1], note)


def vit(options: argparse.Namespace) -> None:
    """ViT-B shapes, Gaussian."""
    shapes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal(shape, dtype=np.float32) for _ in range(options.layers) for shape in shapes]
    dense("ViT-B", matrices, ("0.30", "0.15"), options.repeats)


def orthogonal(options: argparse.Namespace) -> None:
    """LipViT-base shapes, orthogonal up to float32."""
    rng = np.random.default_rng(1)
    drawn = [np.linalg.qr(rng.standard_normal((1024, 1024)))[0] for _ in range(2 * options.layers)]
    dense("LipViT-base", [q.astype(np.float32) for q in drawn], ("0.15", "0.15"), options.repeats)


def convolution(options: argparse.Namespace) -> None:
    """3 x 3 kernels of 256 channels; ratios below 1/20 are aimed at."""
    rng = np.random.default_rng(2)
    smooth = np.outer([0.5, 1.0, 0.5], [0.5, 1.0, 0.5])
    common = rng.standard_normal((256, 256, 1, 1))
    kernels = {"independent": rng.standard_normal((256, 256, 3, 3))}
    kernels["smooth"] = smooth * (common + 0.5 * kernels["independent"])
    for name, kernel in kernels.items():
        symbol = torch.fft.fft2(torch.from_numpy(kernel), (32, 32)).permute(2, 3, 0, 1).reshape(GRID, 256, 256)
        every = GRID // options.frequencies
        sample = symbol[::every].contiguous()
        bound = convolution_norm_upper(kernel)
        svd, certify, verify = medians(
            (
                lambda sample=sample: torch.linalg.svdvals(sample),
                lambda kernel=kernel: convolution_norm_upper(kernel),
                lambda kernel=kernel, bound=bound: convolution_norm_upper(kernel, witness=bound.witness),
            ),
            options.repeats,
        )
        note = f"{bound.method}, slack {bound.slack or 0.0:.1e}; {len(sample)} of {GRID} SVDs timed"
        row(f"3x3x256 {name}: certify", certify, svd * every, "0.05", note)
        row(f"3x3x256 {name}: verify", verify, svd * every, "0.05", note)


def folder(options: argparse.Namespace) -> None:
    """verify --require bound in fresh processes; the norms alone are timed here, on the stored weights."""
    from hf_lipschitz import LipViTConfig, LipViTForImageClassification
    from hf_lipschitz.bounds.certificate import FILE_NAME, Certificate
    from hf_lipschitz.bounds.weights import read_weights

    config = LipViTConfig.from_preset("base", num_hidden_layers=4 * options.layers, stages=None, num_labels=100)
    with tempfile.TemporaryDirectory() as name:
        LipViTForImageClassification(config).save_pretrained(name)
        certificate = Certificate.from_bytes((Path(name) / FILE_NAME).read_bytes())
        weights = {key: array for key, array in read_weights(Path(name)).items() if array.ndim == 2}
        size = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))

        def norms() -> None:
            for label, bound in certificate.matrices.items():
                tensor, _, form = label.partition("|")
                if tensor in weights and form in ("", "abs"):
                    matrix = np.abs(weights[tensor]) if form else weights[tensor]
                    spectral_norm_upper(matrix, witness=bound.witness)

        processes = [lambda code=code: process(code, name) for code in (IMPORT, READ, VERIFY)]
        imports, read, verify, alone = medians((*processes, norms), options.repeats)
        base, peak = (process(code + PEAK, name) * 1024 for code in (IMPORT, VERIFY))
    hashing = read - medians((lambda: process("import hashlib, pathlib, sys", "."),), options.repeats)[0]
    allowed = 2.0 * max(hashing, 0.0) + alone
    note = f"{size / 1e6:.0f} MB, {len(certificate.matrices)} norms; without {imports:.2f} s of imports"
    row("verify --require bound", verify - imports, allowed, "1", f"against 2 x {hashing:.2f} s + norms; {note}")
    print(
        f"\nPeak memory of verify: {(peak - base) / size:.2f} times the file above the imports (aim: 1.5 and a layer)\n"
    )


def process(code: str, argument: str) -> int:
    """Run Python code in a fresh process; the last number that it prints, or 0."""
    command = [sys.executable, "-W", "ignore", "-c", code, argument]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(printed[-1]) if printed else 0


def evaluation(options: argparse.Namespace) -> None:
    """Logits and radii of images, against the logits of a float64 copy."""
    from hf_lipschitz import LipViTConfig, LipViTForImageClassification
    from hf_lipschitz.evaluation.certified import evaluate_certified

    model = LipViTForImageClassification(LipViTConfig.from_preset("nano", num_labels=10)).eval()
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        certificate = model.certificate
    exact = copy.deepcopy(model).double()
    images, labels = torch.rand(512, 3, 32, 32), torch.zeros(512, dtype=torch.long)

    @torch.no_grad()
    def plain() -> None:
        for batch in images.split(256):
            exact(batch.double()).logits.argmax(dim=1)

    def certified() -> None:
        evaluate_certified(model, images, labels, certificate=certificate, batch_size=256)

    inference, certify = medians((plain, certified), options.repeats)
    row("certified evaluation", certify, inference, "1.15", "LipViT nano, 2 batches of 256 images, float64")


PARTS = {part.__name__: part for part in (vit, orthogonal, convolution, folder, evaluation)}


def main() -> None:
    """Print the table as Markdown, with machine, versions and BLAS settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--frequencies", type=int, default=64, help="a power of two, at most 1024")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[index]
    built = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    lapack = [line for line in built if line.startswith(("Intel(R) oneAPI", "OpenBLAS", "LAPACK"))]
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch", "transformers"))
    steering = ", ".join(f"{key}={os.environ.get(key, 'unset')}" for key in STEERING)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    print(f"{machine}; {packages}; options {vars(options)}")
    print(f"NumPy's BLAS: {blas.get('openblas configuration', blas['name'])}; {steering}")
    print(f"torch: {torch.get_num_threads()} threads; {', '.join(lapack)}\n")
    print("| what | median s | against s | ratio | aim | notes |\n| --- | --- | --- | --- | --- | --- |")
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
