"""`python -m benchmarks.gpu.sanitized BACKEND`: every kernel on small awkward shapes, for compute-sanitizer.

Parameters after the steps must be those of the reference.
"""

import sys

import torch

from benchmarks.gpu.device import DEVICE, wait
from id3_kernels import Entries, reference
from id3_kernels.table import kernels_for
from id3_optim import D3, ID3AdamW

SHAPES = ((1,), (255,), (256,), (257,), (33, 65), (4, 1000), (3,))
OPTIONS = (
    {"heuristic": D3(1.0, 2.0)},
    {"heuristic": D3(1.0, 1.0), "max_grad_norm": 0.5, "bias_correction": "entry"},
    {"heuristic": D3(1.0, 0.0), "strategy": "static"},
    {"heuristic": D3(1.0, 0.5), "release_gradients": True},
)


def _tensors(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """The last one lies one entry into its memory."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) ** 3 for shape in (*SHAPES, (300,))]
    made = [x.to(DEVICE, dtype) for x in drawn]
    made[-1] = torch.cat([made[-1][:1], made[-1]])[1:]
    return made


def _trained(backend: str, dtype: torch.dtype, options: dict) -> list[torch.Tensor]:
    params = [torch.nn.Parameter(x) for x in _tensors(dtype, 0)]
    optimizer = ID3AdamW(params, lr=1e-2, budget=0.1, total_steps=4, backend=backend, **options)
    for step in range(4):
        grads = _tensors(dtype, 1 + step)
        if options.get("release_gradients"):
            sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
        else:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
        optimizer.step()
        optimizer.zero_grad()
    wait()
    return [p.detach() for p in params]


def _delta(kernels, dtype: torch.dtype) -> torch.Tensor:
    tensors = _tensors(dtype, 9)
    scores = [x.float().abs() for x in tensors]
    wanted = torch.full((1,), 40, dtype=torch.int64, device=DEVICE), 40
    none = Entries.empty(len(tensors), DEVICE)
    offsets, indices, _ = kernels.select_topk_by_score(scores, *none, *wanted)
    values = kernels.gather(tensors, offsets, indices)
    kernels.scatter_(tensors, offsets, indices, -values)
    wait()
    return torch.cat([x.flatten().float() for x in tensors])


def _sampled(kernels, dtype: torch.dtype) -> torch.Tensor:
    """Gradients of a weight [33, 65] and of an embedding at some entries; the factors lie askew in memory."""
    generator = torch.Generator().manual_seed(10)
    found = []
    for tokens in (0, 1, 128, 300):
        left, right = (torch.randn(tokens, n + 1, generator=generator).to(DEVICE, dtype) for n in (33, 65))
        ids = torch.randint(-1, 40, (tokens,), generator=generator).to(DEVICE)
        entries = Entries.from_lists([range(0, 33 * 65, 7)], DEVICE)
        values = torch.ones(2, len(entries.indices), device=DEVICE)
        kernels.sampled_weight_grad_(left[:, 1:], right[:, 1:], *entries, values[0], True)
        kernels.sampled_embedding_grad_(right[:, 1:], ids, *entries, values[1], False)
        found.append(values)
    wait()
    return torch.cat(found)


def main(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for options in OPTIONS:
            got, expected = (_trained(name, dtype, options) for name in (backend, "reference"))
            same = all(map(torch.equal, got, expected))
            print(f"{dtype} {options}: {'same' if same else 'DIFFERENT'}", flush=True)
        for part in (_delta, _sampled):
            assert torch.equal(part(kernels_for(DEVICE, backend), dtype), part(reference, dtype)), part
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
