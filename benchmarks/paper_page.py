"""The page of the paper's figures and tables: what `paper.py` has measured, and what is not
measured.

    python benchmarks/paper_page.py runs/paper --report reports/paper
"""

from __future__ import annotations

import argparse
import base64
import html
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from paper_drawings import METHODS, drawings
from paper_record import sheet_of
from paper_rows import EXPERIMENTS, PAY
from paper_shown import Experiment, Shown

from asesearch.files import replacing
from asesearch.report import tables
from asesearch.report.wording import number, plus_minus, relative

TITLES = {
    "figure1": "Figure 1: noise-easy or data-easy?",
    "figure3": "Figure 3: score against time saved, all methods",
    "figure4": "Figure 4: one schedule at many numbers of steps",
    "table3": "Table 3: shapes of one budget",
    "table4": "Table 4: one light interval, experts, further training",
    "ablations": "What the recipe is made of",
    "pay": "Do exits still pay?",
}
HEAD = (
    "row",
    "blocks run, data to noise",
    "score ± resampling",
    "± retraining (seeds)",
    "from the better full network, 95 %",
    "block calls",
    "FLOPs",
    "measured time",
    "own training, TFLOP (s)",
    "warm-up, TFLOP",
)
#: Rows of the table that answers `pay`.
ANSWERS = {
    "full, as it is": lambda s: s.row.method == "full" and not s.row.trained,
    "full, equal compute": lambda s: s.row.method == "full" and s.row.trained,
    "exits": lambda s: s.row.method == "exits",
    "cache": lambda s: s.row.method == "cache",
    "exits with cache": lambda s: s.row.method == "exits+cache",
    "fewer steps": lambda s: s.row.method == "steps",
}
NONE = "not measured"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], kind: str = "rows") -> str:
    """An HTML table of a class of its own; cells that begin with "<" are HTML already."""
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{c if c.startswith('<') else html.escape(c)}</td>" for c in row)
        + "</tr>"
        for row in rows
    )
    whole = f'<table class="{kind}"><thead><tr>{top}</tr></thead>{body}</table>'
    return f'<div class="scroll">{whole}</div>'


def cells(experiment: Experiment, shown: Shown) -> tuple[str, ...]:
    """A row's line."""
    row = shown.row
    name = METHODS[row.method][0] if row.method in METHODS else ""
    plain = not name or row.method == "full"
    label = row.label.removeprefix(row.schedule).removeprefix(", ")
    start = (row.label if plain else f"{name}: {label}".removesuffix(": "), row.schedule)
    if not shown.measured:
        return (*start, NONE, *("–" for _ in HEAD[3:]))
    own, warm = shown.tuning_tflop
    difference, margin = experiment.difference(shown)
    error = tables.nan(shown.trained.std_error)
    retrained = number(error, error)
    return (
        *start,
        plus_minus(shown.score.value, tables.nan(shown.score.std_error)),
        f"{retrained} ({len(shown.lines)})" if row.trained else "–",
        _signed(difference, margin),
        relative(shown.get("block_frac")),
        relative(shown.get("flops_frac")),
        _time(shown),
        f"{number(own)} ({shown.tuning_seconds:.0f})" if own else "0",
        number(warm) if warm else "0",
    )


def _time(shown: Shown) -> str:
    """The measured time, and what may be claimed where its block calls can't explain it."""
    told = relative(shown.get("time_frac"), tables.nan(shown.get("time_spread")))
    if shown.credited_frac > shown.get("time_frac"):
        told += f" (better than its block calls can explain: claim {relative(shown.credited_frac)})"
    return told


def _signed(value: float, margin: float) -> str:
    if math.isnan(value):
        return "–"
    if value == margin == 0:
        return "0 (the same images)"
    sign = "+" if value > 0 else ""
    return f"{sign}{plus_minus(value, margin)}"


def answer_cell(experiment: Experiment, shown: Shown) -> str:
    """Score, time, block calls and tuning cost, one under the other."""
    own, warm = shown.tuning_tflop
    difference, margin = experiment.difference(shown)
    lines = [
        f"<b>{plus_minus(shown.score.value, tables.nan(shown.score.std_error))}</b>",
        f"time {_time(shown)}",
        f"blocks {relative(shown.get('block_frac'))}",
        f"training {number(own + warm)} TFLOP" if own + warm else "no training",
    ]
    if not math.isnan(difference):
        lines.insert(1, f"{_signed(difference, margin)} from full")
    if len(shown.lines) > 1:
        error = tables.nan(shown.trained.std_error)
        lines.insert(1, f"± {number(error, error)} over {len(shown.lines)} trainings")
    if shown.row.method != "full":
        lines.append(html.escape(shown.row.label))
    return f"<p>{'<br>'.join(lines)}</p>"


def answers(experiment: Experiment) -> str:
    """The question that users have, in one table."""
    columns = [*PAY, *(s for s in experiment.samplers if s not in PAY)]
    rows = []
    for name, belongs in ANSWERS.items():
        cells = []
        for sampler in columns:
            mine = [s for s in experiment.rows(sampler) if belongs(s) and s.measured]
            mine.sort(key=lambda s: s.get("time_frac"), reverse=True)
            texts = [answer_cell(experiment, s) for s in mine]
            cells.append(f"<div>{''.join(texts)}</div>" if texts else f"<i>{NONE}</i>")
        rows.append((name, *cells))
    return table(("", *columns), rows, "answers")


def verdicts(experiment: Experiment) -> Iterator[str]:
    """A sentence for each row on fresh seeds, from what is on record alone."""
    for sampler in experiment.samplers:
        for shown in experiment.rows(sampler):
            if shown.measured and shown.row.method != "full":
                yield f"{sampler}, {shown.row.label}: {verdict(experiment, shown)}."


def verdict(experiment: Experiment, shown: Shown) -> str:
    """Time saved, or FLOPs where no time is measured, and whether the score differs from the better
    full network's."""
    frac = shown.credited_frac
    cost = "time"
    if math.isnan(frac):
        frac = shown.get("flops_frac")
        cost = "FLOPs"
    percent = f"{abs(100 * (1 - frac)):.0f}\N{NO-BREAK SPACE}%"
    time = f"{percent} of the {cost} saved" if frac <= 1 else f"{percent} more {cost}"
    difference, margin = experiment.difference(shown)
    if math.isnan(difference):
        return f"{time}; no full network is measured to compare with"
    if difference == margin == 0:
        return f"{time}; the same images as the full network's, so nothing was skipped"
    if math.isnan(margin):
        return f"{time}, score {_signed(difference, margin)} (spread unknown)"
    clear = "better than" if difference < 0 else "worse than"
    found = clear if abs(difference) > margin else "no difference shown from"
    reference = experiment.reference(shown.row.against)
    compared = [s for s in (shown, reference) if s is not None and s.row.trained]
    once = " (one training seed)" if any(len(s.lines) == 1 for s in compared) else ""
    return f"{time}, score {_signed(difference, margin)}: {found} the better full network{once}"


def section(experiment: Experiment, folder: Path, source: Path) -> str:
    """One experiment."""
    parts = [f'<h2 id="{experiment.name}">{TITLES[experiment.name]}</h2>']
    if not experiment.lines:
        command = f"python benchmarks/paper.py {experiment.name} --elastic W.safetensors --out DIR"
        return "".join([*parts, f"<p>Not measured yet: <code>{command}</code></p>"])
    parts += [f"<div>{line}</div>" for line in facts(experiment)]
    if experiment.name == "pay":
        parts.append(answers(experiment))
        parts.append("<ul>" + "".join(f"<li>{html.escape(v)}</li>" for v in verdicts(experiment)))
        parts.append("</ul>")
    pictures = []
    for drawing in drawings(experiment):
        svg = base64.b64encode(drawing.save(folder)).decode()
        pictures.append(
            f'<figure><h3>{drawing.title}</h3><img alt="{drawing.title}" '
            f'src="data:image/svg+xml;base64,{svg}"><figcaption>{drawing.caption}</figcaption>'
            "</figure>"
        )
    for group in ("".join(pictures), sheets(experiment, folder, source)):
        parts.append(f'<div class="figures">{group}</div>')
    for sampler in experiment.samplers:
        mine = experiment.rows(sampler)
        if any(shown.measured for shown in mine):
            rows = [cells(experiment, shown) for shown in mine]
            parts.append(f"<h3>Over the full network under {sampler}</h3>{table(HEAD, rows)}")
        else:
            parts.append(f"<p>Under {sampler}: {NONE} ({len(mine)} rows).</p>")
    picks = [cells(experiment, shown) for shown in experiment.rows(stage="pick")]
    if picks:
        what = "Candidates, on the images they were picked by"
        parts.append(f"<details><summary>{what}</summary>{table(HEAD, picks)}</details>")
    experiment.table().to_csv(folder / f"{experiment.name}.csv", index=False, lineterminator="\n")
    if experiment.path.parent.resolve() != folder.resolve():
        shutil.copyfile(experiment.path, folder / experiment.path.name)
    parts.append(
        f'<p><a href="{experiment.name}.csv">Table</a> · '
        f'<a href="{experiment.path.name}">all that is on record</a></p>'
    )
    return "".join(parts)


def sheets(experiment: Experiment, folder: Path, source: Path) -> str:
    """Sample sheets, beside each other, and kept in the page's folder, which it can be made of."""
    out = []
    for shown in experiment.rows():
        name = sheet_of(shown.row.to_dict())
        path = source / name
        if shown.measured and path.is_file() and experiment.name == "figure1":
            image = base64.b64encode(path.read_bytes()).decode()
            if source.resolve() != folder.resolve():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / name)
            score = plus_minus(shown.score.value, tables.nan(shown.score.std_error))
            label = html.escape(f"{shown.row.label}, {shown.row.sampler}: {score}")
            out.append(
                f'<figure class="sheet"><img alt="samples, {label}" '
                f'src="data:image/png;base64,{image}"><figcaption>{label}</figcaption></figure>'
            )
    return "".join(out)


def facts(experiment: Experiment) -> Iterator[str]:
    """Protocol, commands, machines and dates."""
    lines = experiment.lines
    if lines[0]["settings"]["tiny"]:
        yield "<strong>A tiny network: these figures mean nothing.</strong>"
    protocol = next(s.score.protocol for s in experiment.all if s.measured)
    confirmed = [s for s in experiment.rows() if s.measured]
    if confirmed:
        protocol = confirmed[0].score.protocol
    settings = lines[0]["settings"]
    tuned = next((line["settings"] for line in lines if "train" in line["settings"]), None)
    trained_as = "Nothing is fine-tuned."
    if tuned is not None:
        warm = tuned["warm_up"]
        train = tuned["train"]
        trains = [line["settings"]["train"] for line in lines if "train" in line["settings"]]
        steps = " or ".join(dict.fromkeys(f"{each['num_steps']:,}" for each in trains))
        own = tuned.get("full_depth") == "pretrained"
        compute = "for the TFLOP in its row" if own else "for both together"
        trained_as = (
            f"Own steps: {steps} of {train['batch_size']} images from one elastic "
            f"warm-up of {warm['steps']:,} steps of {warm['batch_size']}; equal compute: the full "
            f"network is fine-tuned {compute}."
        )
        if own:
            trained_as += (
                " Early exits have weights of their own, and the pretrained network makes the "
                f"calls at full depth, where {warm['full_frac'] or 'none'} of the warm-up's "
                "samples are."
            )
    trainings = Counter(
        tuple(line["row"].values()) for line in lines if line["training_seed"] is not None
    )
    fewest, seeds = min(trainings.values(), default=1), max(trainings.values(), default=1)
    yield html.escape(
        f"{protocol.metric_name}, {protocol.num_samples:,} images for each of "
        f"{len(protocol.seeds)} seed sets (from {protocol.seeds[0]} on), "
        f"{f'{fewest} to ' if fewest < seeds else ''}{seeds} training "
        f"seed{'s' if seeds > 1 else ''} of own steps; {settings['network']} (weights "
        f"{settings['weights'][:8]}). {trained_as}"
    )
    commands = dict.fromkeys(line["command"] for line in lines)
    text = "<br>".join(f"<code>{html.escape(command)}</code>" for command in commands)
    yield f"<details><summary>Commands ({len(commands)})</summary>{text}</details>"
    machines = dict.fromkeys(
        f"{m['gpu'] or m['cpu']}, {m['threads']} threads, torch {m['versions']['torch']}"
        for m in (line["machine"] for line in lines)
    )
    trained = dict.fromkeys(o for line in lines if (o := line["tuning"]["own_on"]))
    dates = sorted({line["date"] for line in lines})
    yield html.escape(
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} on {'; '.join(machines)}; "
        f"fine-tuned on {'; '.join(trained) or 'none'}."
    )


def write_page(source: Path, folder: Path) -> Path:
    """`index.html`, its figures and their data."""
    folder.mkdir(parents=True, exist_ok=True)
    experiments = [Experiment(name, source) for name in ("pay", *EXPERIMENTS[:-1])]
    body = "".join(section(experiment, folder, source) for experiment in experiments)
    with replacing(folder / "index.html") as part:
        part.write_text(PAGE.replace("BODY", body), encoding="utf-8")
    return folder / "index.html"


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The paper's figures</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem;
  color: #222; }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { flex: 1 1 22rem; max-width: 34rem; margin: 0; }
figure.sheet { flex: 0 0 17.5rem; }
.sheet img { image-rendering: pixelated; }
img { width: 100%; }
h3 { font-size: 1.05rem; }
figcaption { font-size: .9rem; color: #555; }
code { font-size: .85rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
td p { margin: 0 0 .6rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem;
  border-bottom: 1px solid #ddd; white-space: nowrap; }
th { font-weight: normal; color: #555; white-space: normal; }
.answers { width: 100%; min-width: 62rem; table-layout: fixed; font-size: .8rem; }
.answers td { white-space: normal; padding: .3rem; }
.answers th:first-child { width: 4.5rem; }
</style></head><body>
<h1>The paper's figures, measured here</h1>
<p>Moon et al. 2024 (ASE) on a network for Fashion-MNIST, which each experiment names: every row
under one protocol with the cost of its training. Lower scores are better. Costs are over those of
the full network under the sampler named. Two error bars: one standard error over seed sets
(resampling), and over training seeds of the own steps (retraining; the elastic warm-up is one).
What is not measured says so.</p>
BODY
</body></html>
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="folder that paper.py wrote")
    parser.add_argument("--report", type=Path, required=True, help="folder of the page")
    args = parser.parse_args(argv)
    print(write_page(args.rows, args.report))


if __name__ == "__main__":
    main()
