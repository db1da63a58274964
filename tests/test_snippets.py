"""Every Python block of every page runs as it stands there.

What stands before a page's first `##` prepares all of its sections. A page's sections run in one session, in
order, except for `SEPARATE`: there each section begins from the first part alone.
"""

import re

import pages
import pytest

# Pages whose blocks another test runs, with more to check than that they run.
ELSEWHERE = {
    "docs/gpu.md": "tests/test_gpu_page.py",
    "docs/delta-format.md": "tests/optim/test_delta_format.py",
}
SEPARATE = {"docs/trainers.md"}
NEEDS = {"docs/trainers.md": "transformers"}


def sessions():
    """(page, section, blocks to run one after another) of every page with Python."""
    for page in pages.PAGES:
        where, text = pages.name(page), page.read_text()
        if where in ELSEWHERE or not pages.blocks(text, "python"):
            continue
        if where not in SEPARATE:
            yield where, "all", pages.blocks(text, "python")
            continue
        first, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
        for section in sections:
            if code := pages.blocks(section, "python"):
                yield where, section.splitlines()[0], pages.blocks(first, "python") + code


SESSIONS = list(sessions())


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps precision and device for the process; each session sets its own."""
    try:
        from accelerate.state import AcceleratorState
    except ModuleNotFoundError:
        yield
        return
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("where, section, blocks", SESSIONS, ids=[f"{s[0]}-{s[1]}" for s in SESSIONS])
def test_snippet(where, section, blocks, tmp_path, monkeypatch, capsys):
    if where in NEEDS:
        pytest.importorskip(
            NEEDS[where], reason="the page is about the extras `hf`, `peft`, `trl`, `lightning`"
        )
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, where, "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed and printed[-1] and not any(line == "False" for line in printed)


def test_the_pages_show_the_optimizer_deltas_kernels_and_every_trainer():
    shown = {where: "".join(blocks) for where, _, blocks in SESSIONS}
    assert "ID3AdamW" in shown["README.md"] and "load_delta" in shown["docs/guide/deltas.md"]
    assert "select_topk" in shown["docs/guide/kernels.md"]
    sections = {section for where, section, _ in SESSIONS if where == "docs/trainers.md"}
    trainers = {"transformers.Trainer", "PEFT", "TRL", "Accelerate", "Lightning"}
    assert sections >= trainers | {"Streaming to an inference server"}


def test_the_pages_left_out_are_run_by_the_tests_named_here():
    for where, test in ELSEWHERE.items():
        assert where.rpartition("/")[2] in (pages.ROOT / test).read_text()


def test_the_examples_page_shows_every_example():
    text = (pages.ROOT / "docs/guide/examples.md").read_text()
    shown = [
        re.fullmatch(r'--8<-- "(examples/\w+\.py)"\n', code)[1] for code in pages.blocks(text, "{.python}")
    ]
    assert sorted(shown) == sorted(pages.name(path) for path in (pages.ROOT / "examples").glob("*.py"))
    for path in shown:  # the anchor that links to the file lead to
        assert f"{{#{path.removeprefix('examples/').removesuffix('.py')}}}" in text


COMMANDS = [
    (pages.name(page), line)
    for page in pages.PAGES
    for code in pages.blocks(page.read_text(), "bash")
    for line in code.replace("\\\n", " ").splitlines()
    if line.startswith("id3-optim ")
]


@pytest.mark.parametrize("where, line", COMMANDS, ids=[line[:40] for _, line in COMMANDS])
def test_a_command_line_names_a_command_and_its_options(where, line, capsys):
    from id3_optim.cli import main

    _, command, *words = line.split()
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


def test_the_options_in_the_command_line_page_exist(capsys):
    from id3_optim.cli import main

    text = (pages.ROOT / "docs/guide/command-line.md").read_text()
    options = re.findall(r"^\| `(?:([a-z]+) )?(--[a-z-]+)", text, re.MULTILINE)
    known = {}
    for command in {command or "train" for command, _ in options}:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known[command] = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    assert len(options) > 5 and len(known) > 1
    assert [option for command, option in options if option not in known[command or "train"]] == []
