"""How fast an optimizer step with capped norms is, against ``torch.optim.Muon.step`` without any cap.

Medians of ``--repeats`` steps that alternate between what is compared, in one process; ratios are to torch's Muon over
the same matrices and gradients. Unset what steers the BLAS, so that it is the one that users meet::

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python benchmarks/optim.py --write benchmarks/results/optim.md

Parts (``--parts``): ``step`` times steps over the matrices of whole models, with caps in each step (bounds are at the
caps) and with a headroom of 5 %; ``error`` compares the distance to the polar factor and the largest
singular value on a spectrum from 1 to 1e-3; ``training`` times whole training steps of LipViT-small at batch 128 with
SpectralMuon and cap, without cap, and with fused AdamW; ``caps`` times
single caps against an SVD; ``memory`` weighs what an optimizer holds beside the weights.
On a machine with CUDA the same runs there (``--device cuda``) and the table names the card.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz as newton_schulz

from hf_lipschitz.caps.arithmetic import matmul_dtype
from hf_lipschitz.caps.orthogonalize import orthogonalize
from hf_lipschitz.caps.registry import CAPS
from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.spectral_muon import SpectralMuon

LR, VALUE = 0.02, 1.0
PARTS = ["step", "error", "caps", "training", "memory"]
Shapes = list[tuple[int, int]]
GPT = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12


def sync(device: torch.device) -> None:
    """Wait for the device, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(functions: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each function; runs alternate, and the first two rounds warm up."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 2):
        for function, found in zip(functions, times, strict=True):
            sync(device)
            start = time.perf_counter()
            function()
            sync(device)
            if turn > 1:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


class Matrices(nn.Module):
    """Weights of given shapes at norm VALUE, with fixed gradients."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def gaussian(shape: tuple[int, int]) -> Tensor:
            return torch.randn(shape, generator=generator)

        scale = [VALUE / (m**0.5 + n**0.5) for m, n in shapes]
        self.weights = nn.ParameterList(s * gaussian(shape) for s, shape in zip(scale, shapes, strict=True)).to(device)
        for weight, shape in zip(self.weights, shapes, strict=True):
            weight.grad = gaussian(shape).to(device)


def vit_shapes(size: str) -> Shapes:
    """The matrices of a LipViT."""
    with torch.device("meta"):
        model = LipViTForImageClassification(LipViTConfig.from_preset(size))
    return [tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 2 and "classifier" not in name]  # type: ignore[misc]


def cases() -> dict[str, Shapes]:
    """The models whose matrices are stepped."""
    return {
        "12 x 256 x 256": [(256, 256)] * 12,
        "12 blocks of width 256": ([(256, 256)] * 4 + [(1024, 256), (256, 1024)]) * 12,
        "LipViT-tiny": vit_shapes("tiny"),
        "LipViT-small": vit_shapes("small"),
        "GPT, 12 layers of width 768": GPT,
    }


def muon(shapes: Shapes, device: torch.device) -> Callable[[], object]:
    """A step of torch's Muon."""
    return torch.optim.Muon(Matrices(shapes, device).parameters(), lr=LR, momentum=0.95).step


def ours(shapes: Shapes, device: torch.device, *, cap: str | None, headroom: float = 0.0) -> Callable[[], object]:
    """A step of SpectralMuon; with a cap, every bound stands at its value after the steps that warm up."""
    model = Matrices(shapes, device)
    rules = [{"pattern": r"weights\.\d+", "cap": cap or "decay", "norm": "spectral", "value": VALUE}]
    optimizer = SpectralMuon.from_model(model, rules, lr=LR, momentum=0.95)
    if cap is not None:
        Enforcer(model, rules, headroom=headroom).attach(optimizer)
    return optimizer.step


def step_rows(repeats: int, device: torch.device) -> list[tuple[str, ...]]:
    """Ratios of whole steps; of the lazy cap six together, because it acts in every third at this rate."""
    rows = [("matrices", "torch Muon, ms", "no cap", "soft cap", "power cap", "decay", "soft cap, lazy 5 %")]
    for name, shapes in cases().items():
        lazy = ours(shapes, device, cap="spectral_soft_cap", headroom=0.05)
        functions = [muon(shapes, device), ours(shapes, device, cap=None)]
        functions += [ours(shapes, device, cap=cap) for cap in ("spectral_soft_cap", "spectral_power_cap", "decay")]
        functions.append(lambda lazy=lazy: [lazy() for _ in range(6)])
        reference, *others = medians(functions, repeats, device)
        ratios = [f"{each / reference:.2f}" for each in (*others[:-1], others[-1] / 6)]
        rows.append((name, f"{reference * 1e3:.1f}", *ratios))
        print(" | ".join(rows[-1]), flush=True)
    return rows


def error_rows(device: torch.device) -> list[tuple[str, ...]]:
    """``||U - polar||_F / sqrt(k)`` and the largest singular value, on singular values spaced from 1 to 1e-3."""
    rows = [("matrix", "torch Muon", "3 steps", "4 steps", "5 steps", "6 steps")]
    for m, n in ((256, 256), (256, 1024), (768, 768)):
        k = min(m, n)
        generator = torch.Generator().manual_seed(0)
        left, right = (
            torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64))[0] for size in (m, n)
        )
        polar = left @ right.T
        matrix = ((left * torch.logspace(0, -3, k, dtype=torch.float64)) @ right.T).float().to(device)
        results = [newton_schulz(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)]
        results += [orthogonalize(matrix, steps=steps) for steps in (3, 4, 5, 6)]
        figures = []
        for result in results:
            wide = result.double().cpu()
            distance = torch.linalg.matrix_norm(wide - polar) / k**0.5
            figures.append(f"{distance:.3f} ({torch.linalg.svdvals(wide)[0]:.4f})")
        rows.append((f"{m} x {n}", *figures))
    return rows


def training_rows(repeats: int, device: torch.device, batch: int) -> list[tuple[str, ...]]:
    """Whole training steps of LipViT-small."""
    config = LipViTConfig.from_preset("small", num_labels=10)
    images = torch.rand(batch, config.num_channels, config.image_size, config.image_size, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)

    def step_of(build: Callable[[nn.Module], torch.optim.Optimizer], capped: bool) -> Callable[[], object]:
        torch.manual_seed(0)
        model = LipViTForImageClassification(config).to(device).train()
        rules = [
            {**rule, "cap": "spectral_soft_cap"} if rule["norm"] == "spectral" else rule
            for rule in model.config.constraints
        ]
        optimizer = build(model)
        if capped:
            Enforcer(model, rules).attach(optimizer)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, matmul_dtype(device), enabled=matmul_dtype(device) != torch.float32):
                model(pixel_values=images, labels=labels).loss.backward()
            optimizer.step()

        return step

    functions = [
        step_of(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), False),
        step_of(lambda model: SpectralMuon.from_model(model, lr=LR), False),
        step_of(lambda model: SpectralMuon.from_model(model, lr=LR), True),
    ]
    adamw, free, capped = medians(functions, repeats, device)
    return [
        ("training step of LipViT-small", "value"),
        (f"fused AdamW, batch {batch}, s", f"{adamw:.2f}"),
        ("SpectralMuon without cap / AdamW", f"{free / adamw:.3f}"),
        ("SpectralMuon with soft cap / AdamW", f"{capped / adamw:.3f}"),
        ("share of the cap in the step", f"{(capped - free) / capped:.1%}"),
    ]


def cap_rows(repeats: int, device: torch.device) -> list[tuple[str, ...]]:
    """Caps of one matrix 5 % above its cap, norms computed anew, in times of ``torch.linalg.svd`` of it."""
    names = [name for name, cap in CAPS.items() if cap.norm == "spectral"]
    rows = [("matrix", "SVD, ms", *names)]
    for m, n in ((256, 256), (256, 1024), (512, 512)):
        weight = Matrices([(m, n)], device).weights[0].detach()
        weight = weight * (1.05 * VALUE / torch.linalg.matrix_norm(weight, 2))
        functions: list[Callable[[], object]] = [lambda weight=weight: torch.linalg.svd(weight, full_matrices=False)]
        functions += [lambda name=name, weight=weight: CAPS[name].function(weight, value=VALUE) for name in names]
        times = medians(functions, repeats, device)
        rows.append((f"{m} x {n}", f"{times[0] * 1e3:.1f}", *(f"{each / times[0]:.2f}" for each in times[1:])))
        print(" | ".join(rows[-1]), flush=True)
    return rows


def memory_rows(device: torch.device) -> list[tuple[str, ...]]:
    """What the optimizer keeps beside weights and gradients, in sizes of the weights."""
    rows = [("matrices", "state / weights", "work / weights")]
    for name, shapes in cases().items():
        model = Matrices(shapes, device)
        optimizer = SpectralMuon.from_model(
            model, [{"pattern": r"weights\.\d+", "cap": "decay", "value": VALUE}], lr=LR
        )
        optimizer.step()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        state = sum(
            each.numel() * each.element_size()
            for state in optimizer.state.values()
            for each in state.values()
            if isinstance(each, Tensor)
        )
        work = sum(each.numel() * each.element_size() for each in optimizer._work.values())
        rows.append((name, f"{state / weights:.2f}", f"{work / weights:.3f}"))
    return rows


def machine(device: torch.device) -> str:
    """Where and with what this ran."""
    steering = [name for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_NUM_THREADS") if name in os.environ]
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return (
        f"{card}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, products in {matmul_dtype(device)}, "
        f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}; "
        f"environment: {', '.join(steering) or 'nothing that steers the BLAS'}"
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def main() -> None:
    """Run the parts and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    parts: dict[str, Callable[[], list[tuple[str, ...]]]] = {
        "step": lambda: step_rows(arguments.repeats, device),
        "error": lambda: error_rows(device),
        "caps": lambda: cap_rows(arguments.repeats, device),
        "training": lambda: training_rows(max(3, arguments.repeats // 3), device, arguments.batch),
        "memory": lambda: memory_rows(device),
    }
    text = f"# SpectralMuon against torch.optim.Muon\n\nWritten by `benchmarks/optim.py` on: {machine(device)}.\n"
    for part in arguments.parts:
        text += f"\n## {part}\n\n{(parts[part].__doc__ or '').strip()}\n\n{markdown(parts[part]())}"
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
