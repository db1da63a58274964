"""Plain-text tables of a run, for the end of `make gpu-check`."""

from benchmarks.render import VERDICT, limit, number


def summary_table(results: dict) -> str:
    lines = ["", _machine(results.get("machine", {}))]
    if results.get("quick"):
        lines.append("toy models: these times say nothing of a GPU")
    lines += [_commands(part, results[part]) for part in ("build", "tests", "sanitize") if part in results]
    lines += _bench(results.get("bench", {}))
    lines += _end_to_end(results.get("e2e", {}))
    lines += ["", f"{'bar':<64} {'limit':>8} {'measured':>9}"]
    for bar in results.get("bars", []):
        verdict = VERDICT[bar["met"]].strip("*")
        lines.append(f"{bar['what']:<64} {limit(bar):>8} {number(bar['value']):>9} {verdict}")
    return "\n".join(lines)


def _machine(machine: dict) -> str:
    shown = ("gpu", "driver", "cuda", "torch", "triton", "python", "commit", "date")
    return ", ".join(f"{name} {machine.get(name)}" for name in shown)


def _commands(part: str, found: dict) -> str:
    """One line for each command of a part."""
    named = {name: one for name, one in found.items() if isinstance(one, dict)} or {"": found}
    lines = []
    for name, one in named.items():
        reason = one.get("skipped") or one.get("error") or one.get("last_line", "")
        state = "timed out" if one.get("timed_out") else {True: "ok", False: "FAILED"}.get(one.get("ok"), "-")
        lines.append(f"{part} {name}: {state}, {one.get('seconds', 0)} s: {reason[:120]}")
    return "\n".join(lines)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")[:120]


def _bench(found: dict) -> list[str]:
    if not found:
        return []
    lines = [
        "",
        f"{'model':<16} {'B':>6} {'method':<18} {'measure':<26} {'ms':>9} {'GB/s':>7} {'× floor':>8}",
    ]
    for row in found.get("rows", []):
        if "median_ms" not in row:
            continue
        share = f"{row['share']:.1%}" if "share" in row else ""
        numbers = f"{row['median_ms']:>9.4f} {row.get('gb_per_s', ''):>7} {row.get('over_floor', ''):>8}"
        name = row["measure"] + (" (|Λ| = B)" if row.get("active") == 1.0 else "")
        lines.append(
            f"{row.get('model', ''):<16} {share:>6} {row.get('method', ''):<18} {name:<26} {numbers}"
        )
    for row in found.get("rows", []):
        if row.get("measure") == "profile":
            lines += ["", f"kernels of one step, {row['method']}, {row['model']}: µs, count, name"]
            lines += [f"{k['us']:>9.1f} {k['count']:>4} {k['name'][:90]}" for k in row["kernels"][:12]]
    skipped = {**found.get("failed", {}), **dict.fromkeys(found.get("not_run", []), "no time left")}
    skipped |= {row["job"]: row["skipped"] for row in found.get("rows", []) if "skipped" in row}
    lines += [f"skipped {job}: {_last_line(reason)}" for job, reason in skipped.items()]
    return [*lines, f"error: {found['error']}"] if "error" in found else lines


def _end_to_end(found: dict) -> list[str]:
    if not found:
        return []
    lines = ["", f"{'one training step':<18} {'tokens/s':>9} {'peak GB':>8} {'optimizer':>10} {'step ms':>9}"]
    for row in found.get("rows", []):
        if "skipped" in row:
            lines.append(f"{row['method']:<18} skipped: {_last_line(row['skipped'])}")
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        lines.append(
            f"{row['method']:<18} {row['tokens_per_s']:>9.0f} {peak:>8} {row['optimizer_share']:>10.1%}"
            f" {row['step_ms']:>9.1f}"
        )
    for row in ((found.get("release") or {}).get("results") or {}).get("memory", []):
        lines.append(f"{row['model']}, {row['method']}: peak {row['peak_bytes'] / 1e9:.2f} GB")
    lines += [f"skipped {name}: no time left" for name in found.get("not_run", [])]
    return lines
