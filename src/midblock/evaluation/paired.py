"""Two evaluations of the same items, compared: any two lm-evaluation-harness or inspect logs, no model needed.

Reads ``samples_TASK*.jsonl`` of lm-evaluation-harness (one file, or a folder that holds some), ``.eval`` and
``.json`` logs of inspect, and what ``midblock evaluate`` writes. Items are paired by the hash of their
document (by id where a log has none), so that two runs on different subsets are compared on what they share.

| scores | test | interval |
|---|---|---|
| right/wrong | exact McNemar | adjusted Wald, paired shares |
| other scores; means over epochs (inspect) | sign-flip permutation | paired bootstrap over items |
| items in groups (``cluster``) | sign-flip permutation of whole groups | t, clustered standard error [1] |

p values are corrected by Holm over all rows.

References:
    [1] Miller, "Adding error bars to evals", arXiv 2411.00640, sections 2.2 (groups) and 3.1 (epochs).
"""

from __future__ import annotations

import copy
import math
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats as scipy_stats

from midblock.errors import DataError
from midblock.extras import require
from midblock.reading import parse_json, printable, read_json, read_jsonl, user_path
from midblock.results import Answer, Estimate, Reading, Table
from midblock.settings.compare import CompareSettings
from midblock.stats import compare_arms, holm, paired_permutation

__all__ = ["COLUMNS", "LogComparison", "Scores", "compare_logs", "read_log"]

FloatArray = npt.NDArray[np.float64]
COLUMNS = ("task", "metric", "n", "left_out", "epochs", "groups", "a", "b", "difference", "low", "high", "p", "p_holm",
           "test", "a_only", "b_only", "effect_size", "effect", "conclusion", "worst", "best", "detectable")

_LOWER_IS_BETTER = re.compile(r"perplexity|loss|bits_per_byte|bpb|brier|nll|error|ece", re.IGNORECASE)
_STAMP = re.compile(r"_\d{4}-\d{2}-\d{2}T[0-9.\-]+$")
_GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""inspect's grades: correct, incorrect, partial, no answer."""
_NOT_METRICS = frozenset({"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "doc_hash", "prompt_hash",
                          "target_hash", "filter", "metrics", "item"})
_MEMBER_LIMIT = 64 * 2**20
_ZSTANDARD = 93
"""Its number among a ZIP archive's ways to compress."""


@dataclass
class Scores:
    """Scores of one log on one task and metric.

    Attributes:
        values: Item -> epoch -> score.
        groups: Item -> fields of its document, for ``cluster``.
        higher_is_better: Direction of the metric.
    """

    values: dict[str, dict[int, float]] = field(default_factory=dict)
    groups: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    higher_is_better: bool = True


Log = dict[tuple[str, str], Scores]
"""(task, metric) -> scores; lm-eval's filters are part of the metric (``exact_match,strict-match``)."""


# ---------------------------------------------------------------- reading


def read_log(path: Path | str) -> Log:
    """Scores of a log file, or of every log in a folder (the newest of each task).

    Raises:
        DataError: nothing there, or not such a log; the file (and line) is named.
    """
    path = user_path(path, error=DataError)
    if path.is_dir():
        files = sorted([*path.rglob("samples_*.jsonl"), *path.rglob("*.eval")])
        if not files:
            raise DataError(f"{path} holds no samples_*.jsonl of lm-evaluation-harness (lm_eval --log_samples) and no "
                            ".eval log of inspect.")
        newest = {_task_of(f): f for f in sorted(files, key=lambda f: f.name)}
        return {key: scores for f in newest.values() for key, scores in read_log(f).items()}
    if path.suffix == ".eval":
        return _inspect(_members(path), path)
    if path.suffix == ".json":
        stored = read_json(path, limit=16 * _MEMBER_LIMIT, error=DataError)
        samples = stored.get("samples")
        if not isinstance(samples, list):
            raise DataError(f"{path} has no samples; it is no inspect log with samples (and no lm-eval samples file).")
        return _inspect([("header", stored), *((f"sample {i}", s) for i, s in enumerate(samples))], path)
    return _lm_eval(path)


def _task_of(path: Path) -> str:
    """Task that an lm-eval samples file is about, from its name; another file's whole stem."""
    return _STAMP.sub("", path.stem).removeprefix("samples_")


def _lm_eval(path: Path) -> Log:
    task = _task_of(path)
    found: Log = {}
    copies: Counter[tuple[str, str]] = Counter()
    for number, line in read_jsonl(path, error=DataError):
        where = f"{path}:{number}"
        if not isinstance(line, dict) or "doc_id" not in line:
            raise DataError(f"{where} is no sample of lm-evaluation-harness: it has no doc_id.")
        chosen = str(line.get("filter") or "none")
        content = str(line.get("doc_hash") or line["doc_id"])
        copies[content, chosen] += 1
        again = copies[content, chosen]
        item = content if again == 1 else f"{content}-{again}"
        for name, value in _metrics(line, where):
            scores = found.setdefault((task, name if chosen == "none" else f"{name},{chosen}"), Scores(
                higher_is_better=_LOWER_IS_BETTER.search(name) is None))
            scores.values[item] = {1: value}
            doc = line.get("doc")
            scores.groups[item] = doc if isinstance(doc, dict) else {}
    if not found:
        raise DataError(f"{path} holds no scored samples.")
    return found


def _metrics(line: Mapping[str, Any], where: str) -> Iterator[tuple[str, float]]:
    """Name and value of every metric of one sample; [log likelihood, words] becomes nats per word."""
    names = line.get("metrics")
    named = isinstance(names, list)
    for name in names if isinstance(names, list) else [k for k in line if k not in _NOT_METRICS]:
        value = line.get(str(name))
        if isinstance(value, list) and len(value) == 2 and all(_is_number(v) for v in value) and value[1] > 0:
            yield f"{name} (log)", -value[0] / value[1]
        elif _is_number(value):
            yield str(name), float(value)  # type: ignore[arg-type]
        elif named and not isinstance(value, list | dict):  # lists are for metrics over the whole task (F1, BLEU)
            raise DataError(f"{where}: {printable(str(name))} is {printable(repr(value))[:60]}, not a number.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _members(path: Path) -> Iterator[tuple[str, Any]]:
    """Header and samples of an ``.eval`` archive, each within limits."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for name in [n for n in names if n in ("header.json", "_journal/start.json")][:1] + sorted(
                    n for n in names if n.startswith("samples/") and n.endswith(".json")):
                info = archive.getinfo(name)
                if info.file_size > _MEMBER_LIMIT:
                    raise DataError(f"{path}: {printable(name)} has more than {_MEMBER_LIMIT:,} bytes.")
                raw = _content(archive, info)
                where = f"{path}/{printable(name)}"
                try:
                    text = raw.decode()
                except UnicodeDecodeError:
                    raise DataError(f"{where} is not UTF-8 text.") from None
                yield name, parse_json(text, where=where, error=DataError)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as fault:
        raise DataError(f"{path} is no log of inspect: {printable(str(fault))}.") from None


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member's bytes; inspect compresses with Zstandard, which zipfile reads from Python 3.14 on."""
    if info.compress_type != _ZSTANDARD or sys.version_info >= (3, 14):
        with archive.open(info) as member:
            return member.read(_MEMBER_LIMIT + 1)
    require("zstandard", "a .eval log of inspect (Zstandard)")
    import zstandard

    stored = copy.copy(info)  # what lies in the file, as it lies there
    stored.compress_type, stored.file_size = zipfile.ZIP_STORED, info.compress_size
    stored.CRC = None  # type: ignore[assignment]  # the sum is that of the content
    with archive.open(stored) as member, zstandard.ZstdDecompressor().stream_reader(
            member, read_across_frames=True) as reader:
        try:
            content = reader.read(_MEMBER_LIMIT + 1)
        except zstandard.ZstdError as fault:
            raise zipfile.BadZipFile(f"{info.filename}: {fault}") from None
    if zlib.crc32(content) != info.CRC:
        raise zipfile.BadZipFile(f"{info.filename} is damaged")
    return content


def _inspect(parts: Iterable[tuple[str, Any]], path: Path) -> Log:
    """Scores of an inspect log; the first part is its header, the others samples."""
    found: Log = {}
    task = path.stem
    for place, (name, part) in enumerate(parts):
        if not isinstance(part, dict):
            raise DataError(f"{path}: {printable(name)} is no object.")
        if place == 0 and "scores" not in part:
            about = part.get("eval")
            task = str(about.get("task", task)) if isinstance(about, dict) else task
            continue
        scored = part.get("scores")
        if part.get("error") and not scored:  # a sample that failed has no score: it is left out and counted
            continue
        if "id" not in part or not isinstance(scored, dict):
            raise DataError(f"{path}: {printable(name)} has no id or no scores; score the log first (inspect score).")
        epoch = part.get("epoch", 1)
        if not isinstance(epoch, int):
            raise DataError(f"{path}: {printable(name)} has the epoch {printable(repr(epoch))[:40]}.")
        for scorer, score in scored.items():
            value = score.get("value") if isinstance(score, dict) else None
            for metric, number in _grades(str(scorer), value):
                scores = found.setdefault((task, metric), Scores(
                    higher_is_better=_LOWER_IS_BETTER.search(metric) is None))
                scores.values.setdefault(str(part["id"]), {})[epoch] = number
                about = part.get("metadata")
                scores.groups[str(part["id"])] = about if isinstance(about, dict) else {}
    if not found:
        raise DataError(f"{path} holds no scored samples.")
    return found


def _grades(scorer: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _grades(f"{scorer}.{name}", part)
    elif isinstance(value, str) and value in _GRADES:
        yield scorer, _GRADES[value]
    elif _is_number(value):
        yield scorer, float(value)


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True)
class LogComparison(Reading):
    """Result of `compare_logs`.

    Attributes:
        frame: One row per task and metric, columns `COLUMNS`: means ``a`` and ``b``, ``difference`` a - b with its
            interval (of this row alone), p and Holm's p, the items that only one side got right, and what may be
            said of A: better, worse, as good (within the margin either way), no worse, or open. ``worst`` and
            ``best`` are the most by which A can be worse or better, at level alpha/m for the m rows together;
            ``detectable`` is the true difference that these items would have shown with the power asked for.
        notes: Tasks and items that only one log has.
    """

    frame: pd.DataFrame
    notes: list[str]
    settings: CompareSettings

    def answer(self) -> Answer:
        """What the first row says, and how many rows say that A and B differ."""
        told = self.frame["conclusion"]
        apart = int(told.isin(["better", "worse"]).sum())
        alike = int(told.isin(["as good", "no worse"]).sum())
        open_rows = len(told) - apart - alike
        means = f"Of {len(told)} rows (Holm-adjusted) {apart} tell A from B, {alike} show A no worse within the margin"
        means += f", {open_rows} are open: more items are needed there." if open_rows else "."
        return Answer(f"{_told(self.frame.iloc[0], self.settings)}.", means)

    def details(self) -> list[str]:
        """One line for each further row that says something, and one for the rest."""
        lines = [_told(row, self.settings) for _, row in self.frame.iloc[1:].iterrows()]
        return lines[:9] + ([f"{len(lines) - 9} more rows in the table."] if len(lines) > 9 else [])

    @property
    def table(self) -> Table:
        """The tidy table: scores of both sides and their difference by task."""
        table = Table()
        for row in self.frame.to_dict(orient="records"):
            extra = {"task": row["task"], "metric_name": row["metric"]}
            for side in ("a", "b"):
                table.add("model", "all", row["metric"], side, row[side], n=row["n"], **extra)
            table.add("model", "all", row["metric"], "difference",
                      Estimate(row["difference"], row["low"], row["high"], row["n"]), **extra,
                      **{k: row[k] for k in COLUMNS if k not in (
                          "task", "metric", "n", "a", "b", "difference", "low", "high")})
        return table


def compare_logs(a: Path | str, b: Path | str, settings: CompareSettings | None = None,
                 **overrides: Any) -> LogComparison:
    """Compare two logs on the items that both have.

    Args:
        a: A file or folder that `read_log` reads; ``b`` likewise.
        settings: How; ``overrides`` are fields of `CompareSettings`.

    Raises:
        DataError: a log cannot be read, or the two have no task, metric or item in common.
        SettingsError: a setting out of its range.
    """
    wanted = CompareSettings.of(settings, overrides)
    logs = read_log(a), read_log(b)
    notes: list[str] = []
    pairs = _pairs(*logs, wanted, notes)
    rows = []
    for (task, metric), (first, second) in pairs.items():
        items = [i for i in first.values if i in second.values]
        left_out = len(first.values) + len(second.values) - 2 * len(items)
        if not items:
            raise DataError(f"{task}: the two logs share no item; score both on the same documents (they are matched "
                            "by doc_hash, or by id).")
        rows.append({"task": task, "metric": metric, "left_out": left_out,
                     **_row(first, second, items, wanted, len(pairs))})
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"].to_numpy(dtype=np.float64))
    frame["conclusion"] = [_conclude(row, wanted) for _, row in frame.iterrows()]
    return LogComparison(frame[list(COLUMNS)], notes, wanted)


def _pairs(a: Log, b: Log, wanted: CompareSettings, notes: list[str]) -> dict[tuple[str, str], tuple[Scores, Scores]]:
    tasks = {t for t, _ in a}, {t for t, _ in b}
    if len(tasks[0]) == len(tasks[1]) == 1 and tasks[0] != tasks[1]:  # one file each: the user knows what they are
        (left,), (right,) = tasks
        notes.append(f"A is about {left}, B about {right}; they are compared as {left}.")
        b = {(left, metric): scores for (_, metric), scores in b.items()}
    elif alone := sorted(tasks[0] ^ tasks[1]):
        notes.append(f"only one log has {', '.join(alone[:10])}{' and more' if len(alone) > 10 else ''}.")
    shared = {key: (scores, b[key]) for key, scores in a.items() if key in b}
    if wanted.metric is not None:
        known = sorted({m for _, m in shared})
        shared = {k: v for k, v in shared.items() if wanted.metric in (k[1], k[1].split(",")[0])}
        if known and not shared:
            raise DataError(f"no task has the metric {wanted.metric!r} in both logs; there are: {', '.join(known)}.")
    if not shared:
        raise DataError(f"the two logs have no task and metric in common: A has {_keys(a)}; B has {_keys(b)}.")
    return shared


def _keys(log: Log) -> str:
    return ", ".join(f"{t} ({m})" for t, m in list(log)[:5]) + (" ..." if len(log) > 5 else "")


def _row(first: Scores, second: Scores, items: list[str], wanted: CompareSettings, tests: int) -> dict[str, Any]:
    epochs = max(len(s.values[i]) for s in (first, second) for i in items)
    # an item's epochs are answers of one model, with nothing in common but the item: their mean is its score [1]
    x, y = (np.array([np.mean(list(s.values[i].values())) for i in items]) for s in (first, second))
    binary = bool(np.isin(x, (0.0, 1.0)).all() and np.isin(y, (0.0, 1.0)).all())
    sign = 1.0 if first.higher_is_better else -1.0
    # both one-sided tests at level alpha/m hold together for all rows
    together = 1 - 2 * wanted.alpha / tests
    if wanted.cluster is not None:
        groups = _groups(first, second, items, wanted.cluster)
        row, bounds = _clustered(x, y, groups, wanted.confidence, together, wanted.replicates)
    else:
        found, wide = (compare_arms({"a": x, "b": y}, pairs=[("a", "b")], binary=binary, confidence=c,
                                    replicates=wanted.replicates).iloc[0] for c in (wanted.confidence, together))
        row = {k: found[k] for k in ("difference", "low", "high", "p", "test", "effect_size", "effect")} | {"groups": 0}
        bounds = (float(wide["low"]) * sign, float(wide["high"]) * sign)
    half = (row["high"] - row["low"]) / 2
    normal = scipy_stats.norm.ppf
    error = half / float(normal(0.5 + wanted.confidence / 2))
    return {**row, "n": len(items), "epochs": epochs, "a": float(x.mean()), "b": float(y.mean()),
            "a_only": int((x > y).sum()) if binary else None, "b_only": int((x < y).sum()) if binary else None,
            "worst": -min(bounds), "best": max(bounds), "better": float(np.sign(row["difference"] * sign)),
            "detectable": error * float(normal(1 - wanted.alpha / (2 * tests)) + normal(wanted.power))}


def _groups(first: Scores, second: Scores, items: list[str], name: str) -> npt.NDArray[np.int64]:
    """Number of the group of each item."""
    found = []
    for item in items:
        fields = {**second.groups.get(item, {}), **first.groups.get(item, {})}
        if name not in fields:
            known = ", ".join(sorted(map(str, fields))[:10]) or "none"
            raise DataError(f"item {item} has no field {name!r} to group by; its fields: {known}.")
        found.append(str(fields[name]))
    numbers = {group: n for n, group in enumerate(dict.fromkeys(found))}
    if len(numbers) < 2:
        raise DataError(f"all items have one {name!r}; a comparison of one group says nothing about others.")
    return np.array([numbers[g] for g in found])


def _clustered(x: FloatArray, y: FloatArray, groups: npt.NDArray[np.int64], confidence: float, together: float,
               replicates: int) -> tuple[dict[str, Any], tuple[float, float]]:
    """Difference of means with the clustered standard error and a permutation test of whole groups.

    SE^2 = G/(G-1) * sum over groups of (sum over their items of d_i - mean d)^2 / n^2, t with G - 1 degrees of freedom.
    """
    d = x - y
    count = int(groups.max()) + 1
    sums = np.bincount(groups, weights=d - d.mean(), minlength=count)
    error = math.sqrt(count / (count - 1) * float((sums**2).sum())) / d.size
    mean = float(d.mean())
    half, wide = (float(scipy_stats.t.ppf(0.5 + c / 2, count - 1)) * error for c in (confidence, together))
    p = paired_permutation(np.bincount(groups, weights=x, minlength=count),
                           np.bincount(groups, weights=y, minlength=count), replicates)
    spread = float(d.std(ddof=1)) if d.size > 1 else 0.0
    return ({"difference": mean, "low": mean - half, "high": mean + half, "p": p, "groups": count,
             "test": "permutation of groups", "effect_size": mean / spread if spread else math.nan,
             "effect": "cohens_d"}, (mean - wide, mean + wide))


def _conclude(row: pd.Series, wanted: CompareSettings) -> str:
    if row["p_holm"] < wanted.alpha and row["better"] != 0:
        return "better" if row["better"] > 0 else "worse"
    if not row["worst"] <= wanted.margin:  # NaN as well
        return "open"
    return "as good" if row["best"] <= wanted.margin else "no worse"


def _told(row: pd.Series, wanted: CompareSettings) -> str:
    words = {"better": "A is better", "worse": "A is worse", "as good": f"A is as good within {wanted.margin:g}",
             "no worse": f"A is no worse than B by more than {wanted.margin:g}", "open": "not distinguishable"}
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:+.4g}, {row['high']:+.4g}]"
    discordant = "" if row["a_only"] is None or pd.isna(row["a_only"]) else (
        f", {row['a_only']:.0f} items only A, {row['b_only']:.0f} only B")
    seen = f"; a difference of {row['detectable']:.3g} would be seen" if row["conclusion"] == "open" else ""
    return (f"{row['task']} {row['metric']}: {words[row['conclusion']]}: {row['a']:.4g} - {row['b']:.4g} = "
            f"{row['difference']:+.4g}{interval}, Holm p {row['p_holm']:.3g} ({row['test']}, n={row['n']}{discordant})"
            f"{seen}")
