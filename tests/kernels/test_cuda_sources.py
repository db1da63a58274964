"""What the sources of the CUDA backend must not contain: anything that makes a step wait for the GPU."""

import re
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").iterdir())
WAITING = re.compile(
    r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy(?!\w*Async)\w*|cudaMemcpyAsync|cudaMalloc\w*|cudaFree\w*"
    r"|\bitem(<\w+>)?\(|\bnonzero\w*\(|masked_select\(|\.cpu\(|\.cuda\(|\.to\(|\.copy_\(|from_blob|at::tensor\("
    r"|synchronize\(|\bequal\(at|is_nonzero\("
)
FIRST_USE = "uploaded"  # the function that may wait, at first use


def code_of(text: str) -> str:
    """The text without comments, strings and the body of the function that may wait."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r'"(\\.|[^"\\])*"', '""', text)
    return re.sub(rf"\b{FIRST_USE}\([^;{{]*\)\s*{{[^}}]*}}", " ", text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_waits_for_the_gpu(path):
    assert WAITING.findall(code_of(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "cudaStreamSynchronize(stream);",
        "cudaDeviceSynchronize();",
        "cudaMemcpy(to, from, n, cudaMemcpyDeviceToHost);",
        "cudaMemcpyAsync(to, from, n, kind, stream);",
        "n = offsets[-1].item<int64_t>();",
        "found = at::nonzero(mask);",
        "host = offsets.cpu();",
        "const at::Tensor there = host.to(like.device());",
    ],
)
def test_what_waits_is_seen(line):
    assert WAITING.search(code_of(line))
    assert not WAITING.search(code_of(f"// {line}"))
    assert not WAITING.search(code_of(f"at::Tensor {FIRST_USE}(const at::Tensor& host) {{ {line} }}"))


def test_nothing_is_uploaded_but_the_tables_of_bias_correction():
    """They are kept by betas and device; whatever else a step needs travels as parameters of kernels."""
    callers = [path.name for path in SOURCES if f"{FIRST_USE}(" in code_of(path.read_text())]
    assert callers == ["update_ops.cpp"]
