"""The public functions of sampled gradients: what they write and refuse, and that memory is guarded."""

import re

import pytest
import torch
from cases import BF16

import id3_kernels
from id3_kernels import Entries

ONES, E, V = torch.ones(4, 2), Entries.from_lists([[0, 3]]), torch.zeros(2)
IDS = torch.tensor([0, 1, 1, -1])


def weight(left=ONES, right=ONES, entries=E, values=V, **options):
    id3_kernels.sampled_weight_grad_(left, right, entries, values, **options)


def embedding(grad=ONES, ids=IDS, entries=E, values=V):
    id3_kernels.sampled_embedding_grad_(grad, ids, entries, values)


def test_public_functions_add_or_replace_and_are_seen_by_autograd(backend):
    left, values = torch.arange(8.0).reshape(4, 2), torch.tensor([100.0, 200.0, 7.0])
    ones, entries, left, ids, values = backend.here([ONES, E, left, IDS, values])
    version = values._version
    backend.sampled_weight_grad_(left, ones, entries, values)
    assert values.tolist() == [112, 216, 7]
    backend.sampled_weight_grad_(left, ones, entries, values, add=False)
    assert values.tolist() == [12, 16, 7]
    backend.sampled_embedding_grad_(left, ids, entries, values)
    assert values.tolist() == [12, 16 + 8, 7]
    assert values._version > version


REFUSED = {
    "vector": (lambda: weight(V), "left: expected a matrix [tokens, columns], got shape (2,)"),
    "integers": (lambda: weight(ONES.int()), "left: expected float32, bfloat16, float16 or float64"),
    "dtypes": (
        lambda: weight(right=ONES.to(BF16)),
        "right: expected torch.float32 as left, got torch.bfloat16",
    ),
    "devices": (lambda: weight(right=ONES.to("meta")), "right: expected a tensor on cpu, got meta"),
    "tokens": (lambda: weight(right=ONES[:3]), "right: expected 4 tokens as left, got 3"),
    "size": (
        lambda: weight(torch.ones(1, 1).expand(1, 2**16), torch.ones(1, 1).expand(1, 2**15)),
        "right: expected a weight of fewer than 2^31 entries, got 2147483648",
    ),
    "range": (
        lambda: weight(entries=Entries.from_lists([[4]])),
        "entries.indices: expected 0 to 3 in tensor 0, got 4 to 4",
    ),
    "tensors": (lambda: weight(entries=Entries.empty(2)), "entries.offsets: expected 2 offsets, got 3"),
    "values": (
        lambda: weight(values=V.double()),
        "values: expected torch.float32 of shape (2,), got torch.float64 (2,)",
    ),
    "length": (lambda: weight(values=V[:1]), "values: expected torch.float32 of shape (2,)"),
    "grad": (lambda: embedding(V), "grad: expected a matrix [tokens, columns], got shape (2,)"),
    "ids": (
        lambda: embedding(ids=IDS.int()),
        "ids: expected torch.int64 of shape (4,), got torch.int32 (4,)",
    ),
    "few ids": (lambda: embedding(ids=IDS[:3]), "ids: expected torch.int64 of shape (4,)"),
    "many ids": (lambda: embedding(ids=IDS.repeat(2)), "ids: expected 4 tokens as grad, got 8"),
    "negative": (
        lambda: embedding(entries=Entries.from_lists([[-1]])),
        "entries.indices: expected 0 to 2147483646 in tensor 0, got -1 to -1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_that_names_the_argument(backend, name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)) as error, id3_kernels.use_backend(backend.name):
        call()
    assert "\n" not in str(error.value)
    assert V.tolist() == [0, 0]


BAD = {
    "index": {"entries": Entries.from_lists([[0, 4]])},
    "negative index": {"entries": Entries.from_lists([[-1, 0]])},
    "few values": {"values": V[:1]},
    "tokens": {"right": ONES[:3]},
    "dtype": {"right": ONES.to(BF16)},
    "no columns": {"right": ONES[:, :0]},
}


@pytest.mark.parametrize("name", BAD)
def test_direct_calls_guard_memory(cpu, name):
    """The C++ kernel itself: entries may come from a file, and an optimizer does not check them again."""
    given = {"left": ONES, "right": ONES, "entries": E, "values": V.clone()} | BAD[name]
    with pytest.raises(ValueError):
        cpu.table.sampled_weight_grad_(
            given["left"], given["right"], *given["entries"], given["values"], True
        )


@pytest.mark.parametrize("indices", [[3, 0], [2, 2, 1, 3, 0]])
def test_disorder_costs_time_alone(cpu, indices):
    """Indices that are not ascending read no memory but the factors'."""
    left = torch.arange(8.0).reshape(4, 2)
    entries, values = Entries.from_lists([indices]), torch.zeros(len(indices))
    cpu.table.sampled_weight_grad_(left, ONES, *entries, values, False)
    assert values.tolist() == [[12, 12, 16, 16][i] for i in indices]
