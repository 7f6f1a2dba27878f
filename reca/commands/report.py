"""`reca report RUN`: one self-contained HTML page from a run folder; nothing is fetched or recomputed."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reca.errors import ConfigError
from reca.files import write_text

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ margin-bottom: 0; }} h2 {{ margin-top: 2.2rem; border-bottom: 1px solid #ddd; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
img, svg {{ max-width: 100%; height: auto; }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; }}
.note {{ color: #666; }}
</style></head><body>
{body}
</body></html>
"""
_BETTER = {"psnr": "higher", "ssim": "higher", "understanding_cycle": "higher", "retrieval_rank": "lower"}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file; a torn last line of a run that is still going is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder and return its path. Raises ConfigError for any other folder."""
    if not (run / "config.yaml").exists():
        raise ConfigError(
            f"report: {run} is not a run folder (no config.yaml in it); give the folder that train made"
        )
    record = _read_json(run / "run.json")
    summary = _read_json(run / "summary.json")
    metrics, evaluations = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "evaluations.jsonl")
    parts = [
        f"<h1>{_text(record.get('recipe', run.name))}</h1>",
        f'<p class="note">{_text(_headline(summary, metrics))}</p>',
        "<h2>Before and after</h2>",
        _evaluation_table(evaluations),
        *_pictures(run / "samples"),
        "<h2>Training</h2>",
        _curves(metrics, evaluations),
        _throughput_table(metrics, summary),
        "<h2>Run</h2>",
        _table(
            [
                (key, json.dumps(value) if isinstance(value, (dict, list)) else value)
                for key, value in record.items()
            ]
        ),
        "<h2>Configuration</h2>",
        f"<pre>{_text((run / 'config.yaml').read_text(encoding='utf-8'))}</pre>",
    ]
    path = run / "report.html"
    write_text(path, _PAGE.format(title=_text(f"reca: {run.name}"), body="\n".join(parts)))
    return path


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _headline(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    if not summary:
        return f"not finished; {metrics[-1]['step'] if metrics else 0} steps logged so far"
    counts = f"{summary['steps']} steps, {summary['images']} images, {summary['seconds']:.0f} s"
    return f"{summary['status']}: {counts}"


def _table(rows: Sequence[tuple[object, object]]) -> str:
    body = "".join(f"<tr><th>{_text(name)}</th><td>{_text(_number(value))}</td></tr>" for name, value in rows)
    return f"<table>{body}</table>"


def _evaluation_table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return "<p>No evaluation was made.</p>"
    first, last = evaluations[0], evaluations[-1]
    rows = [
        "<tr><th>on what was held out</th><th>step {}</th><th>step {}</th><th></th></tr>".format(
            first["step"], last["step"]
        )
    ]
    for name, before in first.items():
        after = last.get(name)
        if name == "step" or not isinstance(before, (int, float)) or not isinstance(after, (int, float)):
            continue
        better = _BETTER.get(name.rpartition("/")[2])
        hint = f"{better} is better" if better else ""
        rows.append(
            f'<tr><th>{_text(name)}</th><td class="number">{before:.4g}</td>'
            f'<td class="number">{after:.4g}</td><td class="note">{hint}</td></tr>'
        )
    return f"<table>{''.join(rows)}</table>"


def _pictures(folder: Path) -> list[str]:
    """The newest contact sheet and, when there are several, the first."""
    sheets = sorted(folder.glob("*.png")) if folder.is_dir() else []
    chosen = sheets[-1:] + (sheets[:1] if len(sheets) > 1 else [])
    return [_figure(sheet) for sheet in chosen]


def _figure(sheet: Path) -> str:
    image = f"data:image/png;base64,{base64.b64encode(sheet.read_bytes()).decode()}"
    caption = f'<figcaption class="note">{_text(sheet.name)}</figcaption>'
    return f'<figure><img alt="{_text(sheet.stem)}" src="{image}">{caption}</figure>'


def _curves(metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Loss, gradient norm and each evaluated metric over steps, as one inline SVG."""
    from matplotlib.figure import Figure

    panels = [(name, metrics) for name in ("loss", "grad_norm", "lr") if any(name in row for row in metrics)]
    names = [name for name in (evaluations[0] if evaluations else {}) if name != "step" and "/" not in name]
    panels += [(name, evaluations) for name in names]
    if not panels:
        return "<p>No step was logged.</p>"
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(9, 2.4 * rows), layout="constrained")
    for axis, (name, source) in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        points = [(row["step"], row[name]) for row in source if isinstance(row.get(name), (int, float))]
        axis.plot(
            *zip(*points, strict=True), marker="o" if source is evaluations else None, linewidth=1
        ) if points else None
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in figure.axes[len(panels) :]:
        axis.set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _throughput_table(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    rows: list[tuple[object, object]] = []
    for name, label in (
        ("images_per_second", "images per second (median)"),
        ("tokens_per_second", "tokens per second (median)"),
        ("mfu", "model FLOPs utilisation (median)"),
        ("data_wait", "share of time waiting for data (median)"),
        ("peak_memory_gb", "peak memory, GB"),
    ):
        values = sorted(row[name] for row in metrics if isinstance(row.get(name), (int, float)))
        if values:
            rows.append((label, float(values[-1] if name == "peak_memory_gb" else values[len(values) // 2])))
    rows += [(key, summary[key]) for key in ("rejected", "skipped_steps") if key in summary]
    return _table(rows)
