"""`id3-optim train` on files of a few words and models of a few thousand entries."""

from pathlib import Path

from tiny_models import save_bert, save_llama, write_completions, write_reviews

from id3_optim.cli import main


def save_train_files(folder: Path) -> Path:
    """bert/, llama/, reviews.csv, facts.jsonl."""
    save_bert(folder / "bert")
    save_llama(folder / "llama")
    write_reviews(folder / "reviews.csv")
    write_completions(folder / "facts.jsonl")
    return folder


def words(files: Path, output, *more, model="bert", data="reviews.csv", steps=4) -> list[str]:
    """The command line; a later option takes the place of an earlier one."""
    data = files / data
    given = ["--model", files / model, "--train", data, "--eval", data, "--output", output]
    given += ["--steps", steps, "--batch-size", 8, "--budget", 300, "--log-every", 1, "--cpu"]
    return ["train", *map(str, given), *map(str, more)]


def run(capsys, command: list[str]) -> tuple[int, str, str]:
    """The exit code, what was printed, and the last line of the errors."""
    capsys.readouterr()
    try:
        code = main(command)
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out, (printed.err.splitlines() or [""])[-1]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
