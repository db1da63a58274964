"""The benchmarks themselves: what they share, how they are laid out, and that the tiny ones run."""

import ast
import json
from pathlib import Path

import pytest
import torch

from benchmarks import render
from benchmarks.__main__ import COMMANDS, main
from benchmarks.against import slower
from benchmarks.bars import bars_of
from benchmarks.growth import timed_growth
from benchmarks.many import Side, check, many_inputs, ours
from benchmarks.measure import Interleaved, Timed
from benchmarks.sampled import Backward, Layer, timed_layer
from benchmarks.shapes import make_inputs
from benchmarks.worker import digest
from id3_kernels import available_backends
from id3_optim.state.shard import Shard

FILES = sorted((render.ROOT / "benchmarks").rglob("*.py"))
NATIVE = available_backends()["cpu"] is None


# --- layout -------------------------------------------------------------------------------------------


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def reaches(tree: ast.AST) -> list[str]:
    """Underscored names that a file takes from another file: imported, or as an attribute of not `self`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            found += [alias.name for alias in node.names if private(alias.name.rpartition(".")[2])]
        elif isinstance(node, ast.Attribute) and private(node.attr):
            owner = node.value.id if isinstance(node.value, ast.Name) else ast.unparse(node.value)
            found += [f"{owner}.{node.attr}"] if owner not in ("self", "cls") else []
    return found


@pytest.mark.parametrize(
    "source, expected",
    [
        ("from benchmarks.memory import _status_bytes, supported", ["_status_bytes"]),
        ("import picture\npicture._PLAIN", ["picture._PLAIN"]),
        ("x.y._z", ["x.y._z"]),
        ("class A:\n def f(self): return self._x + self.__class__.__name__", []),
    ],
)
def test_reaches(source, expected):
    assert reaches(ast.parse(source)) == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(render.ROOT)))
def test_no_file_takes_a_private_name_of_another(path):
    assert reaches(ast.parse(path.read_text())) == []


def length(function: ast.FunctionDef) -> int:
    """Lines without the docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_files_and_functions_are_short():
    texts = {path.name: path.read_text() for path in FILES}
    assert [name for name, text in texts.items() if len(text.splitlines()) > 300] == []
    nodes = [node for text in texts.values() for node in ast.walk(ast.parse(text))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 100 and [node.name for node in functions if length(node) > 40] == []


# --- commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name, capsys):
    if name in ("release", "training"):
        pytest.importorskip("transformers")
    if name in ("all", "step", "parts", "growth", "deltas", "report", "gpu-report"):
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and "usage: python -m benchmarks" in capsys.readouterr().out


def test_no_command_is_all(capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--update-pages" in capsys.readouterr().out


def test_an_unknown_command_is_refused():
    with pytest.raises(SystemExit, match=r"command: expected one of all, step, .*, got 'stepp'"):
        main(["stepp"])


# --- rendering ----------------------------------------------------------------------------------------


def test_a_bar_is_met_on_its_side():
    assert render.Bar("at most", 0.5, 0.5).met and not render.Bar("at most", 0.5, 0.51).met
    assert render.Bar("at least", 3, 3, sense="≥").met and not render.Bar("at least", 3, 2.9, sense="≥").met
    assert render.Bar("not measured", 3, None).met is None


def test_missed_bars_are_named_with_measured_and_bar():
    bars = [render.Bar("fast", 1, 0.5), render.Bar("slow", 0.55, 0.598), render.Bar("rate", 3, None)]
    assert render.missed(render.bar_rows(bars)) == (
        "1 of 3 bars are met. Missed: slow (0.598 vs ≤ 0.55). Not run: rate."
    )
    assert render.missed(render.bar_rows(bars[:1])) == "1 of 1 bars are met."


def test_a_missed_bar_never_reads_as_its_limit():
    bars = [render.Bar("a", 1.06, 1.0637), render.Bar("b", 1, 1.0004), render.Bar("c", 1, 0.9996)]
    rows = render.bar_rows([*bars, render.Bar("rate", 3, 2.9996, sense="≥")])
    assert [render.measured(bar) for bar in rows] == ["1.064", "1.0004", "1", "2.9996"]
    assert "a (1.064 vs ≤ 1.06); b (1.0004 vs ≤ 1)" in render.missed(rows)
    assert "| b | ≤ 1 | 1.0004 | **missed** |" in render.bars_table(rows)


def test_the_last_column_exists_where_a_bar_has_two_numbers():
    bars = [render.Bar("x |Λ|", 1, 2.0), render.Bar("y", 1, 0.5, at_full=0.0625)]
    assert (
        render.bars_table(render.bar_rows(bars[:1])).splitlines()[2] == "| x \\|Λ\\| | ≤ 1 | 2 | **missed** |"
    )
    assert render.bars_table(render.bar_rows(bars)).splitlines()[3] == "| y | ≤ 1 | 0.5 | met | 0.062 |"


def test_bars_of_older_results_have_no_sense():
    assert render.limit({"limit": 1.25}) == "≤ 1.25"


def test_a_block_is_replaced_and_the_rest_of_the_page_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\nold\n".join(render.BENCH) + "\nafter\n")
    render.replace_block(page, render.BENCH, "new")
    assert page.read_text() == "before\n" + "\nnew\n".join(render.BENCH) + "\nafter\n"
    assert render.block(page, render.BENCH) == "new"
    with pytest.raises(ValueError, match="expected the markers <!-- gpu:begin -->"):
        render.replace_block(page, render.GPU, "new")


def test_links_are_relative_to_the_page():
    picture = render.RESULTS / "x.png"
    assert render.link(picture, render.README) == "benchmarks/results/x.png"
    assert render.link(picture, render.PAGE) == "../benchmarks/results/x.png"
    assert render.link(Path("/elsewhere/x.png"), render.README) == "x.png"


# --- many tensors, growth and other checkouts ---------------------------------------------------------


def test_many_tensors_have_a_row_for_each_measurement(capsys):
    main(["many", "--tensors", "100", "200", "--rounds=1", "--threads=1"])
    printed = capsys.readouterr().out
    assert printed.count("| 100 tensors, ") == printed.count("| 200 tensors, ") == 4
    assert "first step / AdamW(fused=True)'s, 200 tensors | ≤ 3" in printed


def test_many_tensors_whose_first_step_chose_wrongly_are_not_timed():
    inputs = many_inputs(100)
    side = Side(ours, inputs)
    check(side, inputs)
    side.first = side.first + 1
    with pytest.raises(AssertionError, match="selection differs from a stable sort"):
        check(side, inputs)


def test_a_growing_run_times_windows_of_joins_with_a_merge_in_each():
    timed, budget = timed_growth(make_inputs("tiny"), 3, share=0.05)
    assert budget == 1705 and [timed[f"join_{i}"].per_run for i in range(8)] == [budget // 32 // 3 + 1] * 8
    assert timed["update_0"].per_run == 1


def test_a_join_that_loses_an_entry_is_not_timed(monkeypatch):
    settle = Shard.settle

    def loses(shard):
        settle(shard)
        if shard.arrays["indices"].numel():
            shard.arrays["indices"][3] = shard.arrays["indices"][4]

    monkeypatch.setattr(Shard, "settle", loses)
    with pytest.raises(AssertionError, match="join: tensor"):
        timed_growth(make_inputs("tiny"), 3, share=0.05)


def test_the_time_of_a_window_is_divided():
    ticks = []
    methods = {"subject": Timed(lambda: None), "window": Timed(lambda: ticks.append(1), per_run=1_000_000)}
    Interleaved(methods, "subject").ready()
    assert len(ticks) == 1 and methods["window"].seconds[0] < 1e-6


def test_what_is_touched_comes_behind_the_preparation():
    ticks = []
    timed = Timed(
        lambda: ticks.append("run"), lambda: ticks.append("prepare"), touch=lambda: ticks.append("touch")
    )
    Interleaved({"subject": Timed(lambda: None), "other": timed}, "subject").ready()
    assert ticks == ["prepare", "touch", "run"]


# --- sampled gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spread", ["even", "hot"])
def test_sampled_gradients_are_checked_and_timed(dtype, spread):
    layer = Layer(40, 30, 70, dtype, 0.1, spread)
    assert list(timed_layer(layer)) == ["sampled", "dense", "sampled_cached", "dense_cached"]
    backward = Backward(layer)
    assert len(backward.values) == 120
    backward.sampled = lambda: backward.values.fill_(1e3)
    with pytest.raises(AssertionError, match="sampled: less accurate"):
        backward.check()


def test_a_bar_of_sampled_gradients_is_of_the_worst_layer():
    def row(rows, ms):
        names = ("sampled", "dense", "sampled_cached", "dense_cached")
        methods = {name: {"median_ms": time} for name, time in zip(names, ms, strict=True)}
        return {"kind": "sampled", "case": Layer(rows, 8).about(), "methods": methods}

    bars = bars_of([row(8, (1, 20, 1, 40)), row(9, (2, 25, 1, 50))], [])
    mine = [(bar["limit"], bar["value"], bar["met"]) for bar in bars if bar["what"].startswith("sampled")]
    assert mine == [(0.06, 0.08, False), (0.06, 0.025, True)]
    assert not [bar for bar in bars_of([], []) if bar["what"].startswith("sampled")]


@pytest.mark.skipif(not NATIVE, reason="the C++ extension is not built")
def test_a_checkout_beside_itself_computes_the_same_bits(tmp_path, capfd):
    output = tmp_path / "against.json"
    words = ("--tiny", "--rounds=2", "--threads=1", "--limit=0", f"--output={output}")
    with pytest.raises(SystemExit) as ended:
        main(["against", str(render.ROOT), *words])
    assert ended.value.code == 1  # every ratio is above 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["method"] for row in rows] == ["id3"] * 3 + ["apply", "revert"] * 2
    assert all(row["same_bits"] and row["this"]["rounds"] == row["other"]["rounds"] == 2 for row in rows)
    printed = capfd.readouterr().out
    assert printed.count("**slower**") == len(rows) and "differ" not in printed


def test_slower_is_above_the_limit():
    rows = [{"case": str(ratio), "ratio": ratio} for ratio in (0.5, 1.03, 1.04)]
    assert [row["case"] for row in slower(rows, 1.03)] == ["1.04"]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=f"tree: expected a checkout of the project, got {tmp_path}"):
        main(["against", str(tmp_path)])


def test_digests_see_one_bit():
    x = torch.zeros(4)
    assert digest([x]) == digest([x.clone()]) != digest([torch.tensor([0.0, 0, 0, -0.0])])


# --- where models are deployed ------------------------------------------------------------------------


def test_what_is_deployed_is_checked_and_timed(tmp_path, capsys):
    pytest.importorskip("peft")
    words = ("--model=MiniLM-L6", "--rounds=1", "--steps=2", "--threads=1", f"--output={tmp_path}")
    main(["deploy", *words])
    assert capsys.readouterr().out.count("≤") == 7
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert results["bytes"]["updates"] < results["bytes"]["diffs"] < results["bytes"]["full"]


def test_a_shared_reference_has_the_losses_of_a_copy(tmp_path, capsys):
    pytest.importorskip("trl")
    words = ("--size=small", "--rounds=1", "--steps=2", "--threads=1", f"--output={tmp_path}")
    main(["reference", *words])
    assert "peak memory" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text())["losses"]) == 2


def test_memory_beside_quantised_weights(tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is no extra of this package")
    main(["quantized", "--size=small", "--threads=1", f"--output={tmp_path}"])
    assert "peak memory beside 4-bit weights" in capsys.readouterr().out
