"""`id3-optim train` in two processes of torchrun, whole (DistributedDataParallel) and split (`--fsdp`)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="`train` comes with the extra `hf`")

from safetensors.torch import load_file
from tiny_models import write_reviews
from torchrun import launch
from train_command import run, save_train_files, snapshot, words
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from id3_optim import load_delta
from id3_optim.cli import main, metrics, tasks

LLAMA = {"model": "llama", "data": "facts.jsonl"}
TIED = {**LLAMA, "model": "tied-llama"}
REPEAT = ["--strategy", "repeat"]
HALF = ["--batch-size", 4, "--save-every", 2]
DELTA = [*HALF, "--delta-only", "--originals"]
SERIES = [*DELTA, "--fsdp", "--save-at", 100, "--eval-every", 2]
RESUMED = ["fsdp again", "fsdp after ddp", "ddp after fsdp", "series again"]


def commands(files):
    """Name → words: of a run, of its continuation from a checkpoint, of a run that fails in one process."""

    def of(name, *more, **what):
        return words(files, files / name, *map(str, more), **what)

    def go_on(name, other, *more, **what):
        keep = ["keep", str(files / other / "checkpoint-2"), str(files / name)]
        return {f"keep {name}": keep, name: of(name, *more, "--resume", **what)}

    also, report = ["--also-eval", files / "facts.jsonl"], ["--report", files / "report.json"]
    return {
        "ddp": of("ddp", *DELTA, **LLAMA),
        "ddp also": of("ddp also", *DELTA, *also, **LLAMA),
        "fsdp": of("fsdp", *DELTA, "--fsdp", **LLAMA),
        **go_on("fsdp again", "fsdp", *DELTA, "--fsdp", **LLAMA),
        **go_on("fsdp after ddp", "ddp", *DELTA, "--fsdp", **LLAMA),
        **go_on("ddp after fsdp", "fsdp", *DELTA, **LLAMA),
        "released": of("released", *DELTA, "--fsdp", "--release-gradients", "--keep", 1, **LLAMA),
        "series": of("series", *SERIES, *also, **LLAMA),
        **go_on("series again", "series", *SERIES, *also, **LLAMA),
        "repeat": of("repeat", *DELTA, *REPEAT, "--fsdp", **LLAMA),
        **go_on("repeat again", "repeat", *DELTA, *REPEAT, "--fsdp", **LLAMA),
        "repeat whole": of("repeat whole", *DELTA, *REPEAT, **LLAMA),
        "tied": of("tied", *HALF, "--fsdp", **TIED),
        **go_on("tied again", "tied", *HALF, "--fsdp", **TIED),
        "tied whole": of("tied whole", *HALF, **TIED),
        "mean": of("mean", *HALF, "--fsdp", "--pooling", "mean", "--accumulate", 2),
        "tuned": of("tuned", *HALF, "--fsdp", *report, *also, "--save-plots", "--lr", 0.01, **LLAMA),
        "head": of("head", *HALF, "--fsdp", "--bf16", "--eval", files / "odd.csv"),
        **go_on("head again", "head", *HALF, "--fsdp", "--bf16", "--eval", files / "odd.csv"),
        "head whole": of("head whole", *HALF, "--bf16", "--eval", files / "odd.csv"),
        "adamw": of("adamw", *HALF, "--optimizer", "adamw", "--fsdp"),
        **go_on("adamw again", "adamw", *HALF, "--optimizer", "adamw", "--fsdp"),
        "again": of("fsdp", *DELTA, "--fsdp", **LLAMA),
        "nan": ["fail", "nan", *of("nan", *DELTA, "--fsdp", "--steps", 9, **LLAMA)],
        "nan, whole": ["fail", "nan", *of("nan, whole", *DELTA, "--steps", 9, **LLAMA)],
        "nan, unsaved": ["fail", "nan", *of("nan, unsaved", "--steps", 9, "--fsdp", **LLAMA)],
        "nan, whole, unsaved": ["fail", "nan", *of("nan, whole, unsaved", "--steps", 9, **LLAMA)],
        "no memory": ["fail", "no memory", *of("no memory", *DELTA, "--fsdp", **LLAMA)],  # ends a process
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = save_train_files(tmp_path_factory.mktemp("files"))
    write_reviews(folder / "odd.csv", 41)
    shutil.copytree(folder / "llama", folder / "tied-llama")
    tied = LlamaConfig.from_pretrained(folder / "llama", tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(tied).save_pretrained(folder / "tied-llama")
    return folder


@pytest.fixture(scope="module")
def ran(files):
    """Of each process: (exit status, stdout, stderr) by the name of the command."""
    (files / "commands.json").write_text(json.dumps(commands(files)))
    done = launch(Path(__file__).parent / "train_ranks_run.py", files)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((files / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


FAIL = {"again", "nan", "nan, whole", "nan, unsaved", "nan, whole, unsaved", "no memory"}


def test_the_first_process_prints_and_both_succeed(ran):
    for name in ran[0].keys() - FAIL:
        assert [found[name][0] for found in ran] == [0, 0], (name, ran[0][name][2][-500:])
        assert "written to" in ran[0][name][1], name
        assert ran[1][name][1] == "" and "step" not in ran[1][name][2], name


def delta_of(files, name):
    return (files / name / "delta.safetensors").read_bytes()


@pytest.mark.parametrize("name", [*RESUMED, "released", "series", "ddp also"])
def test_split_or_whole_or_resumed_the_delta_is_the_same(ran, files, name):
    assert delta_of(files, "ddp") == delta_of(files, "fsdp") == delta_of(files, name)
    last = [files / run / "checkpoint-4/model.safetensors" for run in ("fsdp", name)]
    one, other = map(load_file, last)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_repeated_choices_and_tied_weights(ran, files):
    assert len({delta_of(files, name) for name in ("repeat", "repeat again", "repeat whole")}) == 1
    names = "tied", "tied again", "tied whole"
    split, resumed, whole = (load_file(files / name / "model.safetensors") for name in names)
    assert split.keys() == resumed.keys() == whole.keys() and "lm_head.weight" not in whole
    assert all(x.equal(whole[name]) and x.equal(resumed[name]) for name, x in split.items())
    model = AutoModelForSequenceClassification.from_pretrained(files / "mean", trust_remote_code=True)
    assert type(model).__name__ == "MeanPoolingClassifier"


def test_two_processes_train_what_one_does_with_twice_the_batch(ran, files, tmp_path):
    """The same rows make a step; sums in another order may choose another entry among near ties."""
    assert main(words(files, tmp_path / "one", *DELTA, "--batch-size", "8", **LLAMA)) == 0
    one, two = load_delta(tmp_path / "one/delta.safetensors"), load_delta(files / "fsdp/delta.safetensors")
    entries = [{(n, i) for n, c in d.changes.items() for i in c.indices.tolist()} for d in (one, two)]
    assert len(entries[0]) == len(entries[1]) == 300 and len(entries[0] & entries[1]) > 290
    assert two.settings["n_entries"] == one.settings["n_entries"]


def test_what_is_written_loads_in_one_process(ran, files):
    assert not list(files.glob("*/unfinished")) and not list(files.glob("**/.*partial"))
    model = AutoModelForCausalLM.from_pretrained(files / "tuned")
    base = AutoModelForCausalLM.from_pretrained(files / "llama")
    changed = sum(int((p != q).sum()) for p, q in zip(model.parameters(), base.parameters(), strict=True))
    assert 0 < changed <= 300
    assert (files / "series/delta-150.safetensors").is_file() and (files / "tuned/plots.png").is_file()
    folder = files / "tuned/checkpoint-4"
    delta = load_delta(folder / "delta.safetensors")
    delta.apply(base)
    assert all(map(torch.equal, model.parameters(), base.parameters()))


def test_metrics_are_those_of_all_rows(ran, files):
    """The perplexity that both processes report is that of one process over every row, each once."""
    report = json.loads((files / "report.json").read_text())["metrics"]
    tokenizer = AutoTokenizer.from_pretrained(files / "tuned")
    task = tasks.read_task(str(files / "facts.jsonl"), str(files / "facts.jsonl"))
    rows = tasks.encode(task.eval, task, tokenizer, 32).rows
    batch = tasks.collate(rows, tasks.padding_token(tokenizer))
    for name, measured in {"tuned": ("eval", "also"), "llama": ("before",)}.items():
        model = AutoModelForCausalLM.from_pretrained(files / name).eval()
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        sums = metrics.reduce_logits("causal-lm")(logits, batch["labels"]).sum(0)
        for prefix in measured:
            assert report[f"{prefix}_token_loss"] == pytest.approx(float(sums[0] / sums[1]), rel=1e-5)


def test_a_head_in_float32_beside_weights_in_bfloat16(ran, files):
    models = [
        AutoModelForSequenceClassification.from_pretrained(files / name, dtype=torch.float32).state_dict()
        for name in ("head", "head again", "head whole")
    ]
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]) and torch.equal(value, models[2][name]), name


def test_adamw_resumes(ran, files):
    last = [files / name / "checkpoint-4/model.safetensors" for name in ("adamw", "adamw again")]
    one, other = map(load_file, last)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_folder_with_results_is_refused_by_both(ran):
    for found in ran:
        assert found["again"][0] == 2 and "--output: expected a new or an empty folder" in found["again"][2]


@pytest.mark.parametrize("name", ["nan", "nan, whole"])
def test_a_loss_that_is_no_number_on_one_rank_ends_both(ran, files, name):
    for rank, found in enumerate(ran):
        code, _, error = found[name]
        expected = f"id3-optim: error on rank {rank}: model.embed_tokens.weight: expected finite weights"
        assert code == 2 and error.splitlines()[-1].startswith(expected), error  # when step 4 is to be saved
        assert f"--resume goes on from {files / name / 'checkpoint-2'}" in error
    for rank, found in enumerate(ran):
        expected = f"id3-optim: error on rank {rank}: loss: expected finite numbers, got nan in steps 3 to 5"
        assert found[f"{name}, unsaved"][2].splitlines()[-1].startswith(expected)
    assert not (files / name / "delta.safetensors").exists()


def test_a_rank_without_memory_ends_both(ran, files):
    codes, errors = zip(*((found["no memory"][0], found["no memory"][2]) for found in ran), strict=True)
    assert codes == (2, 2)
    assert "error on rank 1: DefaultCPUAllocator: can't allocate" in errors[1]
    assert "less is needed with a smaller --batch-size" in errors[1]
    assert (
        errors[0].splitlines()[-1].startswith("id3-optim: error on rank 0: expected an answer of every rank")
    )
    assert not (files / "no memory/unfinished").exists()


def test_a_killed_rank_leaves_the_older_checkpoint(ran, files):
    """Both processes end; the run goes on from the last checkpoint that is whole, to the same delta."""
    script, resumed = Path(__file__).parent / "train_ranks_run.py", {}
    for name, ending in {"killed 0": "optimizer.pt", "killed 1": "rng_state_1.pth"}.items():
        folder = files / f"{name} of"
        folder.mkdir()
        command = words(files, files / name, *map(str, DELTA), "--fsdp", **LLAMA)
        (folder / "commands.json").write_text(json.dumps({name: ["kill", ending, *command]}))
        done = launch(script, folder)
        assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr[-3000:]
        assert [path.name for path in files.glob(f"{name}/checkpoint-*")] == ["checkpoint-2"]
        resumed[name] = [*command, "--resume"]
    (folder / "commands.json").write_text(json.dumps(resumed))
    done = launch(script, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in resumed:
        assert delta_of(files, name) == delta_of(files, "fsdp")
        assert not (files / name / "unfinished").exists()


def test_another_number_of_processes_is_refused(ran, files, capsys):
    before = snapshot(files / "fsdp")
    command = words(files, files / "fsdp", *DELTA, "--resume", **LLAMA)
    code, _, error = run(capsys, command)
    assert code == 2 and "processes: expected 2, as in checkpoint-4, got 1" in error
    assert snapshot(files / "fsdp") == before


EXCLUDED_BY_FSDP = (
    ["--method", "fish"],
    ["--method", "lora"],
    ["--method", "id3-mean"],
    ["--method", "random+adapter"],
    ["--sparse-backward"],
    ["--memory-report"],
    ["--tensor-cap", "0.5"],
    ["--prune", "2"],
    ["--heuristic", "d3-relative"],
)


def test_options_that_exclude_each_other(files, tmp_path, capsys, monkeypatch):
    code, _, error = run(capsys, words(files, tmp_path / "a", "--fsdp"))
    assert code == 2 and "--fsdp: expected the processes of a launcher, got none; start" in error
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for method in ("id3-sum", "gradient-dynamic"):
        command = words(files, tmp_path / "a", "--sparse-backward", "--method", method)
        code, _, error = run(capsys, command)
        assert code == 2 and f"--method {method}: does not apply to released gradients: it" in error
    for option in EXCLUDED_BY_FSDP:
        code, _, error = run(capsys, words(files, tmp_path / "a", "--fsdp", *option))
        assert code == 2 and f"error on rank 1: {option[0]}: does not apply to --fsdp: " in error
    assert not (tmp_path / "a").exists()


def test_the_command_under_torchrun(files, tmp_path):
    """As a user starts it; a fault in one process ends both."""
    command = ["-m", "id3_optim.cli", *words(files, tmp_path / "out", *DELTA, "--fsdp", **LLAMA)]
    done = launch(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written to") == 1 and done.stderr.count("4/4") >= 1
    done = launch(*command)
    assert done.returncode != 0 and "--output: expected a new or an empty folder" in done.stderr
