"""Every Triton kernel compiles ahead of time for each GPU, the streaming kernel to the code it should be.

Needs no GPU. The compiler runs in a process of its own, since under TRITON_INTERPRET=1, which the other
tests set, a kernel can not be compiled.
"""

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import machine_code

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
REGISTER_CEILING = 64  # 65536 registers then hold 32 one-warp programs, the most that a multiprocessor takes
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
STREAMS = [
    f"tile_maxima {kind} {dtype}{active}"
    for kind in ("g/d", "g/dd")
    for dtype in ITEM_BYTES
    for active in ("", " active")
]
ON, OFF = True, False
ALIGNED = ("left", "right", "padded")  # what a launch finds to be multiples of 16

ARGUMENTS = {
    "*i64": "params grads param_codes grad_codes tensors codes first_tile tiles offsets b_offsets param grad "
    "step tokens wanted k state histogram slots table sums first last arrays item_bytes joined best_place "
    "places order place",
    "*i32": "owners lengths numels indices b_indices index keys words maxima best age counts",
    "*fp32": "out exp_avg exp_avg_sq master roots grad_scale found_inf clip best_score best_grad score value",
    "*fp64": "exponent unbiased lr weight_decay total",
    "*u8": "active",
    "*i16": "values",
    "fp32": "eps rest1 beta2 rest2 widest",
    "i32": "n n_tensors n_arrays n_held stride room room_added capacity numel longest longest_root run "
    "n_tokens n_columns token_stride column_stride padded low",
    "i64": " ".join(["padding", *(f"a{i:02}" for i in range(64))]),
}
TYPES = {name: kind for kind, names in ARGUMENTS.items() for name in names.split()}


def kernels():
    """Name -> (kernel, constants, warps), every variant that differs in more than a number."""
    import triton.language as tl

    from id3_kernels.triton import entries, norm, score, selection, tables, topk, update

    stream = {"CHUNK": 4096, "ROWS": selection.ROWS, "FULL": ON, "EXCLUDE": OFF, "QUICK": ON}
    out = {}
    for name in STREAMS:
        _, kind, dtype, *active = name.split()
        code = 0 if dtype == "float32" else 1
        constants = stream | {"KIND": kind, "PARAM": code, "GRAD": code, "EXCLUDE": bool(active)}
        out[name] = selection.tile_maxima_kernel, constants, 1
    for kind in ("g", "g/√d", "g·√d", "g·d", "g·dd", "pow", "given"):
        constants = stream | {"KIND": kind, "PARAM": 2, "GRAD": 2, "FULL": kind != "pow", "EXCLUDE": ON}
        constants["QUICK"] = kind in score.QUICK_KINDS
        out[f"tile_maxima {kind}"] = selection.tile_maxima_kernel, constants, 1
    mixed = {"KIND": "g/d", "PARAM": 1, "GRAD": 0}
    out["tile_maxima mixed"] = selection.tile_maxima_kernel, stream | mixed, 1
    for kind, exclude in (("g/d", ON), ("pow", ON), ("given", OFF)):
        block = {"KIND": kind, "EXCLUDE": exclude, "LISTED": exclude, "BLOCK": topk.BLOCK}
        for digit in (0, 1, 2) if kind == "g/d" else (2,):
            out[f"count_digits {kind} {digit}"] = topk.count_digits_kernel, block | {"ROUND": digit}, 4
        out[f"count_winners {kind}"] = topk.count_winners_kernel, block, 4
        out[f"write_winners {kind}"] = topk.write_winners_kernel, block, 4
    out["write_table"] = tables.write_table_kernel, {}, 1
    block = {"BLOCK": 1024}
    out |= {k.__name__: (k, block, 4) for k in (selection.clear_kernel, selection.mark_active_kernel)}
    out["d3_score"] = score.d3_score_kernel, {"KIND": "g/d", "PARAM": 1, "GRAD": 0, "BLOCK": 1024}, 4
    flags = dict.fromkeys(("MASTER", "AGE", "MAXIMIZE", "SCALE", "FOUND", "CLIP"), ON)
    out["adamw"] = update.adamw_kernel, flags | {"COMPACT": OFF, "BLOCK": 256}, 4
    absent = dict.fromkeys(("master", "age", "grad_scale", "found_inf", "clip"))
    flags = dict.fromkeys(flags, OFF)
    out["adamw_compact"] = update.adamw_kernel, flags | absent | {"COMPACT": ON, "BLOCK": 256}, 4
    moves = {"BITS": tl.int16, "BLOCK": 256}
    out |= {k.__name__: (k, moves, 4) for k in (entries.gather_kernel, entries.scatter_kernel)}
    out |= {k.__name__: (k, block, 4) for k in (entries.spread_kernel, entries.copy_back_kernel)}
    out |= {k.__name__: (k, block, 4) for k in (norm.take_values_kernel, norm.squares_kernel)}
    out["total"] = norm.total_kernel, {}, 1
    return out | of_released_gradients() | of_sampled_gradients()


def of_released_gradients():
    from id3_kernels.triton import collect

    block = {"BLOCK": collect.BLOCK}
    out = {"places": (collect.places_kernel, block, 4), "keep": (collect.keep_kernel, block, 4)}
    for code, flag in ((0, OFF), (1, ON)):
        out[f"take {code}"] = collect.take_kernel, block | {"CODE": code, "ADD": flag}, 4
        out[f"merge {code}"] = collect.merge_kernel, block | {"CODE": code, "MAY_HOLD": flag}, 4
    return out


def of_sampled_gradients():
    from id3_kernels.triton import sampled

    out = {"columns": (sampled.columns_kernel, {"TILE": sampled.TILE}, 4)}
    lanes = {"LANES": sampled.LANES, "BLOCK_TOKENS": sampled.BLOCK_TOKENS, "BLOCK": sampled.BLOCK}
    for code, add in ((0, OFF), (1, ON), (2, OFF)):
        flags = {"CODE": code, "ADD": add}
        out[f"products {code}"] = sampled.products_kernel, lanes | flags, 4
        out[f"embedding {code}"] = sampled.embedding_kernel, flags | {"BLOCK": sampled.EMBEDDING_BLOCK}, 4
    return out


def compile_one(kernel, constants, warps, target):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if TARGETS[target][0] == "hip" and "QUICK" in constants:
        constants = constants | {"QUICK": OFF}
    names = kernel.arg_names
    items = ("*fp32", "*i16", "*fp16")[constants.get("CODE", 1)]  # bfloat16 comes as its bits
    types = TYPES | dict.fromkeys(("matrix", "turned", "left", "right"), items)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    by_value = ("take_kernel", "take_values_kernel", "squares_kernel", "products_kernel", "embedding_kernel")
    if kernel.__name__ in by_value:  # not moved by their bits
        signature["values"] = "*fp32"
    if kernel.__name__ == "places_kernel":
        signature["first"] = "i64"
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in ALIGNED}
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options).asm


def disassembled(cubin, folder):
    """Registers per thread, and how often each instruction stands in the code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)

    def said(tool, flag):
        return subprocess.run([tools / tool, flag, path], capture_output=True, text=True, check=True).stdout

    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", said("nvdisasm", "-c"))
    registers = int(re.search(r"REG:(\d+)", said("cuobjdump", "-res-usage"))[1])
    (instructions,) = machine_code.kernels(path).values()
    issued = max((loop.issued for loop in machine_code.streaming_loops(instructions)), default=0)
    return {"registers": registers, "instructions": collections.Counter(code), "issued": issued}


def table_signatures():
    """What a launch makes of the parameters of `write_table_kernel`, for numbers of any size."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from id3_kernels.triton.tables import BATCH, write_table_kernel

    backend = make_backend(GPUTarget(*TARGETS["sm_90"]))
    bind = create_function_from_signature(write_table_kernel.signature, write_table_kernel.params, backend)
    sizes = [0, 1, 16, -1, 2**31 - 1, 2**31, 2**40 + 16, 2**47 + 3]
    table = torch.empty(BATCH, dtype=torch.int64)
    return [bind(table, *[size] * BATCH)[1] for size in sizes]


def main(folder):
    """Compiles everything and prints one JSON object: target -> kernel -> what came out."""
    report = {"table": table_signatures()}
    for target in TARGETS:
        report[target] = {}
        for name, variant in kernels().items():
            asm = compile_one(*variant, target)
            found = {"binary": len(asm.get("cubin") or asm.get("hsaco") or b"")}
            if "cubin" in asm:
                found |= disassembled(asm["cubin"], folder)
            report[target][name] = found
    print(json.dumps(report))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__, folder], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loads(instructions, pattern):
    return sum(n for name, n in instructions.items() if re.match(pattern, name))


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(compiled, target):
    sizes = {name: found["binary"] for name, found in compiled[target].items()}
    assert len(sizes) >= 37
    assert all(size > 0 for size in sizes.values()), sizes


@pytest.mark.parametrize("target", NVIDIA)
def test_nothing_spills(compiled, target):
    spills = {name: loads(found["instructions"], "LDL|STL") for name, found in compiled[target].items()}
    assert not any(spills.values()), spills


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", STREAMS)
def test_streaming_kernel_stays_below_the_register_ceiling(compiled, name, target):
    ceiling = 80 if target == "sm_100" else REGISTER_CEILING  # its compiler takes more; 25 programs remain
    assert compiled[target][name]["registers"] <= ceiling


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", STREAMS)
def test_streaming_kernel_reads_16_bytes_at_a_time(compiled, name, target):
    """Both tiles of θ and of g come in 128-bit loads of one warp, and no entry in a narrower one; twice, as a
    second loop scores tiles again."""
    _, _, dtype, *active = name.split()
    instructions = compiled[target][name]["instructions"]
    assert loads(instructions, r"LDG\.E.*\.128") * 32 * 16 == 2 * (2 * 2 * 256 * ITEM_BYTES[dtype])
    bitmap = loads(instructions, r"LDG\.E.*\.[US](8|16)")
    assert bitmap <= 4 if active else bitmap == 0


@pytest.mark.parametrize(("kind", "ceiling"), [("g/d", 20.1), ("g/dd", 20.6)])
def test_a_streamed_entry_takes_few_instructions(compiled, kind, ceiling):
    """Of 16 entries per lane and iteration; 20.6 are 75 % of what an H200 issues while it reads an entry."""
    issued = compiled["sm_90"][f"tile_maxima {kind} bfloat16 active"]["issued"]
    assert 160 < issued <= 16 * ceiling


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("code", [0, 1, 2])
def test_products_read_16_bytes_at_a_time(compiled, code, target):
    """A block of 128 tokens of 32 entries, by 128 threads: of both factors, nothing in narrower loads."""
    instructions, item_bytes = compiled[target][f"products {code}"]["instructions"], 4 if code == 0 else 2
    assert loads(instructions, r"LDG\.E.*\.128") * 128 * 16 == 2 * 128 * 32 * item_bytes
    assert loads(instructions, r"LDG\.E.*\.[US](8|16)") == 0


def test_one_compiled_kernel_writes_tables_of_any_numbers(compiled):
    """Every number comes as an int64, neither narrower because it is small nor a constant because it is 1."""
    _, *numbers = compiled["table"][0]
    assert numbers == [["i64", None]] * 64
    assert all(signature == compiled["table"][0] for signature in compiled["table"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
