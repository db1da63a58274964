"""The table of whole runs' times: how long a step takes, beside full fine-tuning with fused AdamW."""

from __future__ import annotations

from statistics import fmean

from benchmarks.render import table

_ABOUT = """Milliseconds of a training step (forward, backward, optimizer), the mean over a run of
{steps} steps, one run at a time; `/ full`: the share of full fine-tuning with fused AdamW. {cpu}, {threads}
threads. Scores of runs this short, not tuned, say nothing."""


def time_table(report: dict) -> str:
    """A row for each method: its mean step over the seeds."""
    times = {}
    for run in (run for run in report["runs"] if "step_ms" in run):  # a run that diverged has none
        times.setdefault(run["method"], []).append(run["step_ms"]["total"])
    means = {method: fmean(found) for method, found in times.items()}
    full = means.get("full")
    lines = [
        [method, f"{mean:.0f}", "–" if full is None else f"{mean / full:.2f}"]
        for method, mean in means.items()
    ]
    machine = report["machine"]
    about = _ABOUT.format(steps=report["steps"], cpu=machine["cpu"], threads=machine["threads"])
    return "\n\n".join([table(["method", "step (ms)", "/ full"], lines), about])
