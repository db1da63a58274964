"""The op table through the CUDA kernels as the host compiler builds them, on CPU tensors.

`emulated_cuda/cuda_runtime.h` stands in for CUDA and runs a kernel thread by thread.
"""

import ctypes
import functools
import mmap
import subprocess
import tempfile
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FORMS = ["stored", "listed", "all"]  # `Form` of csrc/cuda/selection.h
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
cuts_by_grid = False  # candidates of any number, not of many alone


class Row(ctypes.Structure):
    """`TensorRow` of csrc/cuda/tensors.h."""

    _fields_ = [
        ("param", c_void_p),
        ("grad", c_void_p),
        ("param_dtype", c_int32),
        ("grad_dtype", c_int32),
        ("numel", c_int32),
        ("first_chunk", c_int32),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """Compiles the kernels; takes some seconds. A signed integer that overflows ends the process."""
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "emulated_cuda/harness.cpp"]
    flags = ["-O1", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-fsanitize=signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    includes = [f"-I{HERE / 'emulated_cuda'}", f"-I{CSRC}"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "emulated.so"
        command = ["g++", *flags, *includes, "-x", "c++", *map(str, sources), "-o", str(out)]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(out))
    names = "chunks blocks_for launches candidate_room most_wanted tile row_bytes chunks_of"
    loaded.least_slots_of_grid.restype = c_int64
    for name in names.split():
        getattr(loaded, f"{name}_emulated").restype = c_int64
    loaded.collect_state_length.restype = c_int64
    loaded.squared_norm_emulated.restype = c_double
    assert ctypes.sizeof(Row) == loaded.row_bytes_emulated()
    return loaded


def address(tensor):
    return None if tensor is None else c_void_p(tensor.data_ptr())


def rows(params, grads):
    """The tensors as the kernels see them; float64 is only moved, so its code does not matter."""
    n = max(len(params), len(grads))
    table = (Row * max(n, 1))()
    for j in range(n):
        pair = [column[j] if j < len(column) else None for column in (params, grads)]
        codes = [DTYPES.index(t.dtype) if t is not None and t.dtype in DTYPES else 0 for t in pair]
        numel = 0 if pair[1] is None else pair[1].numel()
        table[j] = Row(*(None if t is None else t.data_ptr() for t in pair), *codes, numel, -1)
    return table


def pages(numel):
    """float32 zeros that lie in pages of their own."""
    return torch.frombuffer(mmap.mmap(-1, 4 * numel), dtype=torch.float32)


def protect(tensor, readable=False):
    """Lets a tensor of `pages` be read and written, or makes one read end the process."""
    allowed = mmap.PROT_READ | mmap.PROT_WRITE if readable else 0
    assert ctypes.CDLL(None).mprotect(address(tensor), c_int64(4 * tensor.numel()), allowed) == 0


def unreadable(numel):
    """float32, of which one read ends the process."""
    tensor = pages(numel)
    protect(tensor)
    return tensor


def entries(offsets, indices):
    """offsets, indices and their capacity as arguments."""
    return offsets.numel() - 1, address(offsets), address(indices), c_int64(indices.numel())


def runs(offsets, indices):
    """`entries` of offsets [M + 1] or [R, M + 1]: the rows' number and stride come behind M."""
    stride = offsets.stride(0) if offsets.dim() == 2 else 0
    n_runs = offsets.shape[0] if offsets.dim() == 2 else 1
    addresses = address(offsets), address(indices), c_int64(indices.numel())
    return offsets.shape[-1] - 1, n_runs, c_int64(stride), *addresses


def d3_score(param, grad, eps, exp):
    scores = torch.empty(param.shape)
    library().d3_score_emulated(
        rows([param], [grad]), c_int64(param.numel()), c_float(eps), c_double(exp), address(scores)
    )
    return scores


def select(params, grads, offsets, indices, k, capacity, eps, exp, given):
    """The result, and its form of FORMS."""
    out = torch.full(offsets.shape[-1:], -7)
    picked, scores = torch.full((capacity,), -7, dtype=torch.int32), torch.full((capacity,), float("nan"))
    if capacity == 0 or not sum(g.numel() for g in grads if g is not None):
        return (out.zero_(), picked.zero_(), scores.zero_()), None
    form = library().select_topk_emulated(
        rows(params, grads), *runs(offsets, indices)[:5], address(k), c_int64(capacity),
        c_float(eps), c_double(exp), int(given), address(out), address(picked), address(scores),
    )  # fmt: skip
    assert form >= 0, "the workspace is not as the next call expects it"
    return (out, picked, scores), FORMS[form]


def select_topk(params, grads, offsets, indices, k, capacity, eps, exp):
    return select(params, grads, offsets, indices, k, capacity, eps, exp, False)[0]


def select_topk_by_score(scores, offsets, indices, k, capacity):
    return select([], scores, offsets, indices, k, capacity, 0, 0, True)[0]


def collect_(
    param, grad, score, offsets, indices, values, add, place, best_score, best_place, best_grad, state, k,
    again, eps, exp,
):  # fmt: skip
    fused = not again and state.numel() > 0 and best_score.numel() > 0
    by_grid = cuts_by_grid or best_score.numel() >= library().least_slots_of_grid()
    assert not fused or state.numel() >= library().collect_state_length()
    library().collect_emulated(
        rows([param], [grad]), None if score is None else rows([], [score]), *runs(offsets, indices)[1:],
        address(values), int(add), c_int64(place), *map(address, (best_score, best_place, best_grad)),
        c_int64(best_score.numel()), address(state) if fused else None, address(k), c_float(eps),
        c_double(exp), int(by_grid),
    )  # fmt: skip


def candidate_room(k):
    state = c_int64(-1)
    return library().candidate_room_emulated(c_int64(k), ctypes.byref(state)), state.value


def most_wanted(slots):
    return library().most_wanted_emulated(c_int64(slots))


def gather(tensors, offsets, indices):
    values = torch.empty(indices.numel(), dtype=tensors[0].dtype if tensors else torch.float32)
    library().gather_emulated(
        rows(tensors, []), *entries(offsets, indices), values.element_size(), address(values)
    )
    return values


def scatter_(tensors, offsets, indices, values):
    library().scatter_emulated(
        rows(tensors, []), *entries(offsets, indices), values.element_size(), address(values)
    )


def squared_norm(tensors, offsets, indices):
    total = library().squared_norm_emulated(rows([], tensors), *runs(offsets, indices))
    return torch.tensor(total, dtype=torch.float64)


def token_matrix(t):
    """The address of a matrix [tokens, columns], and its strides and sizes."""
    return address(t), (c_int64 * 4)(*t.stride(), *t.shape)


def sampled_weight_grad_(left, right, offsets, indices, values, add):
    library().sampled_weight_grad_emulated(
        *token_matrix(left), *token_matrix(right), DTYPES.index(left.dtype), *runs(offsets, indices)[1:],
        address(values), int(add),
    )  # fmt: skip


def sampled_embedding_grad_(grad, ids, offsets, indices, values, add):
    ids, tokens = ids.sort(stable=True)
    library().sampled_embedding_grad_emulated(
        *token_matrix(grad), DTYPES.index(grad.dtype), address(ids), address(tokens),
        *runs(offsets, indices)[1:], address(values), int(add),
    )  # fmt: skip


def join_(arrays, offsets, b_offsets, b_indices, b_values):
    columns = (arrays, [b_indices, *b_values])
    pointers = [(c_void_p * len(arrays))(*(t if t is None else t.data_ptr() for t in c)) for c in columns]
    widths = (c_int32 * len(arrays))(*(a.element_size() for a in arrays))
    library().join_emulated(
        *pointers, widths, len(arrays), c_int64(min(a.numel() for a in arrays)), address(offsets),
        *entries(b_offsets, b_indices),
    )  # fmt: skip


def adamw_(params, grads, *rest):
    _adamw(params, grads, None, *rest)


def adamw_compact_(params, values, *rest):
    _adamw(params, [], values, *rest)


def _adamw(
    params, grads, values, offsets, indices, exp_avg, exp_avg_sq, master, age, step,
    lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, clip, tensor_lr,
):  # fmt: skip
    scalars = [None if t is None else t.float() for t in (grad_scale, found_inf, clip)]
    library().adamw_emulated(
        rows(params, grads), *runs(offsets, indices), address(values),
        0 if values is None else DTYPES.index(values.dtype),
        *map(address, (exp_avg, exp_avg_sq, master, age, step)),
        *map(c_double, (lr, beta1, beta2, eps, weight_decay)), int(maximize), *map(address, scalars),
        address(tensor_lr), int(tensor_lr is not None and tensor_lr.dtype == torch.float64),
    )  # fmt: skip
