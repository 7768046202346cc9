"""Comparison of two logs: what is read, how items are paired, and every figure against a loop of its own."""

from __future__ import annotations

import json
import math
import sys
import zipfile
import zlib

import numpy as np
import pytest
from scipy import stats as scipy_stats

from midblock.errors import DataError, MissingExtraError, SettingsError
from midblock.evaluation.paired import COLUMNS, compare_logs, read_log


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def sample(n, right, *, metric="exact_match", chosen="strict-match", doc=None):
    return {"doc_id": n, "doc": doc or {"question": n}, "doc_hash": f"h{n}", "target": "x", "arguments": {},
            "resps": [], "filtered_resps": [], "filter": chosen, "metrics": [metric], metric: right}


def lm_eval(path, rights, **more):
    return lines(path, [sample(n, float(r), **more) for n, r in enumerate(rights)])


def test_right_and_wrong_with_mcnemar_by_hand(tmp_path):
    a = [1] * 30 + [1] * 12 + [0] * 3 + [0] * 15
    b = [1] * 30 + [0] * 12 + [1] * 3 + [0] * 15
    found = compare_logs(lm_eval(tmp_path / "a" / "samples_t_2026-01-02T03-04-05.678.jsonl", a),
                         lm_eval(tmp_path / "b" / "samples_t_2027-01-02T03-04-05.678.jsonl", b))
    row = found.frame.iloc[0]
    assert list(found.frame.columns) == list(COLUMNS)
    assert (row["task"], row["metric"], row["n"], row["left_out"]) == ("t", "exact_match,strict-match", 60, 0)
    assert (row["a_only"], row["b_only"]) == (12, 3)
    # two-sided sign test of 12 against 3: twice the tail of the binomial
    tail = sum(math.comb(15, k) for k in range(4)) / 2**15
    assert row["p"] == pytest.approx(2 * tail)
    assert row["p_holm"] == row["p"]
    assert row["difference"] == pytest.approx(0.15)
    assert row["a"] == pytest.approx(42 / 60)
    assert row["conclusion"] == "better"
    assert "A is better: 0.7 - 0.55 = +0.15" in found.summary()
    assert "12 items only A, 3 only B" in found.summary()
    assert found.notes == []


def test_items_are_paired_by_their_document_not_by_their_place(tmp_path):
    rng = np.random.default_rng(0)
    right = {n: float(rng.random() < 0.5) for n in range(40)}
    a = lines(tmp_path / "a.jsonl", [sample(n, right[n]) for n in range(40)])
    shuffled = [sample(n, right[n]) for n in rng.permutation(range(5, 45)).tolist() if n in right]
    b = lines(tmp_path / "b.jsonl", [{**s, "doc_id": i} for i, s in enumerate(shuffled)])
    found = compare_logs(a, b)
    row = found.frame.iloc[0]
    assert (row["n"], row["left_out"], row["difference"], row["p"]) == (35, 5, 0.0, 1.0)
    assert found.notes == ["A is about a, B about b; they are compared as a."]


def test_without_hashes_ids_pair_and_copies_keep_their_order(tmp_path):
    def without(n, right):
        return {k: v for k, v in sample(n, right).items() if k not in ("doc_hash", "metrics")}

    log = read_log(lines(tmp_path / "samples_t.jsonl", [without(3, 1.0), without(4, 0.0)]))
    assert log["t", "exact_match,strict-match"].values == {"3": {1: 1.0}, "4": {1: 0.0}}
    log = read_log(lines(tmp_path / "samples_u.jsonl", [sample(1, 1.0), sample(1, 0.0), sample(1, 0.5, chosen="none")]))
    assert log["u", "exact_match,strict-match"].values == {"h1": {1: 1.0}, "h1-2": {1: 0.0}}
    assert log["u", "exact_match"].values == {"h1": {1: 0.5}}


def test_several_tasks_are_corrected_together_and_the_newest_file_counts(tmp_path):
    rng = np.random.default_rng(1)
    for side, lift in (("a", 0.25), ("b", 0.0)):
        for task in ("t", "u", "v"):
            gain = lift if task == "t" else 0.0
            lm_eval(tmp_path / side / "model" / f"samples_{task}_2026-05-01T00-00-00.1.jsonl",
                    rng.random(150) < 0.5 + gain)
    lm_eval(tmp_path / "a" / "model" / "samples_t_2025-05-01T00-00-00.1.jsonl", [0] * 150)
    lm_eval(tmp_path / "b" / "model" / "samples_w_2025-05-01T00-00-00.1.jsonl", [0] * 150)
    found = compare_logs(tmp_path / "a", tmp_path / "b")
    frame = found.frame.set_index("task")
    assert list(frame.index) == ["t", "u", "v"]
    ordered = sorted(frame["p"])
    running = 0.0
    expected = {}
    for i, p in enumerate(ordered):
        running = max(running, min(1.0, p * (3 - i)))
        expected[p] = running
    assert frame["p_holm"].tolist() == pytest.approx([expected[p] for p in frame["p"]])
    assert frame.loc["t", "conclusion"] == "better"
    assert found.notes == ["only one log has w."]
    turned = compare_logs(tmp_path / "b", tmp_path / "a").frame.set_index("task")
    assert turned.loc["t", "conclusion"] == "worse"
    assert turned.loc["t", "difference"] == -frame.loc["t", "difference"]


def test_metrics_that_are_better_when_lower(tmp_path):
    rng = np.random.default_rng(2)
    words = rng.integers(5, 50, 60)
    base = rng.normal(3, 0.5, 60)

    def log(path, rise):
        return lines(path, [sample(n, [-float(w * (x + rise)), int(w)], metric="word_perplexity", chosen="none")
                            for n, (w, x) in enumerate(zip(words, base, strict=True))])

    found = compare_logs(log(tmp_path / "a.jsonl", -0.1), log(tmp_path / "b.jsonl", 0.0))
    row = found.frame.iloc[0]
    assert row["metric"] == "word_perplexity (log)"
    assert row["difference"] == pytest.approx(-0.1)
    assert row["conclusion"] == "better"
    assert row["a"] == pytest.approx(np.mean(base) - 0.1)


def test_metric_is_chosen_by_name_or_with_its_filter(tmp_path):
    rows = [s for n in range(10) for s in (sample(n, 1.0), sample(n, 0.0, chosen="flexible-extract"))]
    path = lines(tmp_path / "samples_t.jsonl", rows)
    assert set(compare_logs(path, path).frame["metric"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert len(compare_logs(path, path, metric="exact_match").frame) == 2
    one = compare_logs(path, path, metric="exact_match,strict-match").frame
    assert one["metric"].tolist() == ["exact_match,strict-match"]
    with pytest.raises(DataError, match=r"no task has the metric 'acc'.*exact_match,flexible-extract"):
        compare_logs(path, path, metric="acc")


def test_groups_with_loops_of_their_own(tmp_path):
    rng = np.random.default_rng(3)
    passages = rng.integers(0, 12, 90)
    shift = rng.normal(0.05, 0.3, 12)
    x = rng.normal(0, 0.1, 90) + shift[passages]
    y = rng.normal(0, 0.1, 90)
    a = lines(tmp_path / "a.jsonl", [sample(n, float(v), metric="f1", doc={"passage": int(p)})
                                     for n, (v, p) in enumerate(zip(x, passages, strict=True))])
    b = lines(tmp_path / "b.jsonl", [sample(n, float(v), metric="f1", doc={"passage": int(p)})
                                     for n, (v, p) in enumerate(zip(y, passages, strict=True))])
    row = compare_logs(a, b, cluster="passage").frame.iloc[0]
    d, mean, total = x - y, float(np.mean(x - y)), 0.0
    for group in set(passages.tolist()):
        inner = sum(d[i] - mean for i in range(90) if passages[i] == group)
        total += inner**2
    groups = len(set(passages.tolist()))
    error = math.sqrt(total * groups / (groups - 1)) / 90
    half = scipy_stats.t.ppf(0.975, groups - 1) * error
    assert row["groups"] == groups
    assert (row["low"], row["high"]) == pytest.approx((mean - half, mean + half))
    # every assignment of signs to the groups
    sums = [sum(d[i] for i in range(90) if passages[i] == g) for g in set(passages.tolist())]
    hits = 0
    for k in range(2**groups):
        hits += abs(sum(s if k >> j & 1 else -s for j, s in enumerate(sums))) >= abs(sum(sums)) - 1e-12
    assert row["p"] == pytest.approx(hits / 2**groups)
    assert row["test"] == "permutation of groups"
    ungrouped = compare_logs(a, b).frame.iloc[0]
    assert ungrouped["p"] < row["p"]  # items of one passage are not independent
    with pytest.raises(DataError, match=r"no field 'book' to group by; its fields: passage"):
        compare_logs(a, b, cluster="book")
    one = lines(tmp_path / "one.jsonl", [sample(n, 1.0, doc={"passage": 1}) for n in range(9)])
    with pytest.raises(DataError, match="all items have one 'passage'"):
        compare_logs(one, one, cluster="passage")


def test_as_good_and_no_worse_within_the_margin(tmp_path):
    rng = np.random.default_rng(4)
    values = rng.normal(0, 1, 300)
    a = lines(tmp_path / "a.jsonl", [sample(n, float(v), metric="f1") for n, v in enumerate(values)])
    noise = rng.normal(0, 0.02, 300)
    b = lines(tmp_path / "b.jsonl", [sample(n, float(v), metric="f1") for n, v in enumerate(values + noise)])
    assert compare_logs(a, b, margin=0.02).frame["conclusion"].item() == "as good"
    assert compare_logs(a, b, margin=1e-5).frame["conclusion"].item() == "open"
    row = compare_logs(a, b).frame.iloc[0]
    assert -row["best"] < row["difference"] < row["worst"] or row["worst"] > -row["difference"]
    # detectable: (z(1 - alpha/2) + z(power)) times the error behind the interval
    error = (row["high"] - row["low"]) / 2 / 1.959964
    assert row["detectable"] == pytest.approx(error * (1.959964 + 0.841621), rel=1e-5)


def inspect_log(path, grades, *, epochs=1, task="t", metadata=None):
    samples = [{"id": n, "epoch": e + 1, "input": "?", "metadata": metadata(n) if metadata else {},
                "scores": {"match": {"value": g}}} for n, g in enumerate(grades) for e in range(epochs)]
    header = {"version": 2, "status": "success", "eval": {"task": task, "model": "m"}}
    if path.suffix == ".json":
        path.write_text(json.dumps({**header, "samples": samples}))
        return path
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps(header))
        for s in samples:
            archive.writestr(f"samples/{s['id']}_epoch_{s['epoch']}.json", json.dumps(s))
        archive.writestr("summaries.json", "[]")
    return path


@pytest.mark.parametrize("suffix", [".eval", ".json"])
def test_inspect_logs(tmp_path, suffix):
    grades = ["C"] * 20 + ["I"] * 15 + ["P"] * 3 + [True, 0.25]
    log = read_log(inspect_log(tmp_path / f"a{suffix}", grades))
    scores = log["t", "match"]
    assert [scores.values[str(n)][1] for n in range(40)] == [1.0] * 20 + [0.0] * 15 + [0.5] * 3 + [1.0, 0.25]
    other = inspect_log(tmp_path / f"b{suffix}", ["I"] * 40)
    row = compare_logs(tmp_path / f"a{suffix}", other, cluster=None).frame.iloc[0]
    assert row["difference"] == pytest.approx((20 + 1.5 + 1.25) / 40)


def test_the_score_of_an_item_is_its_mean_over_epochs(tmp_path):
    rng = np.random.default_rng(0)
    path = {}
    for name, share in (("a", 0.8), ("b", 0.5)):
        path[name] = inspect_log(tmp_path / f"{name}.json", ["C"] * 40, epochs=3)
        stored = json.loads(path[name].read_text())
        for sample in stored["samples"]:
            sample["scores"]["match"]["value"] = "C" if rng.random() < share else "I"
        path[name].write_text(json.dumps(stored))
    means = {}
    for name in path:
        by_item = {}
        for sample in json.loads(path[name].read_text())["samples"]:
            by_item.setdefault(sample["id"], []).append(float(sample["scores"]["match"]["value"] == "C"))
        means[name] = np.array([sum(v) / 3 for v in by_item.values()])
    row = compare_logs(path["a"], path["b"]).frame.iloc[0]
    assert (row["epochs"], row["n"], row["test"], row["a_only"]) == (3, 40, "permutation", None)
    d = means["a"] - means["b"]
    assert row["difference"] == pytest.approx(d.mean())
    assert row["p"] < 0.01
    half = scipy_stats.t.ppf(0.975, 39) * d.std(ddof=1) / 40**0.5
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.1)
    one = inspect_log(tmp_path / "one.eval", ["I"] * 40)  # every epoch of the other side counts
    assert compare_logs(path["a"], one).frame["difference"].item() == pytest.approx(means["a"].mean())


def test_logs_that_inspect_has_compressed_with_zstandard(tmp_path):
    """Written as inspect_ai 0.3.285 writes them: method 93, one frame a member."""
    zstandard = pytest.importorskip("zstandard")
    plain = inspect_log(tmp_path / "plain.eval", ["C"] * 20 + ["I"] * 10)
    packed = tmp_path / "packed.eval"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            made = zipfile.ZipInfo(info.filename)
            target.writestr(made, zstandard.ZstdCompressor().compress(content))
            made.CRC, made.file_size = zlib.crc32(content), len(content)
            made.compress_type = 93
    if sys.version_info < (3, 14):
        with zipfile.ZipFile(packed) as archive, pytest.raises(NotImplementedError):
            archive.read(archive.namelist()[0])
    assert read_log(packed) == read_log(plain)
    raw = bytearray(packed.read_bytes())
    raw[raw.index(b"samples/0_epoch_1.json") + 60] ^= 0xFF
    packed.write_bytes(raw)
    with pytest.raises(DataError, match="no log of inspect"):
        read_log(packed)


def test_without_zstandard_one_line_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("zstandard")
    if sys.version_info >= (3, 14):
        pytest.skip("zipfile reads it")
    log = tmp_path / "a.eval"
    with zipfile.ZipFile(log, "w") as archive:
        made = zipfile.ZipInfo("header.json")
        archive.writestr(made, b"x")
        made.compress_type = 93
    monkeypatch.setattr("midblock.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"midblock\[inspect\]"):
        read_log(log)


def test_samples_that_failed_are_left_out(tmp_path):
    a = inspect_log(tmp_path / "a.json", ["C"] * 12)
    stored = json.loads(a.read_text())
    stored["samples"][3] |= {"scores": None, "error": {"message": "no answer"}}
    b = tmp_path / "b.json"
    b.write_text(json.dumps(stored))
    row = compare_logs(a, b).frame.iloc[0]
    assert (row["n"], row["left_out"]) == (11, 1)


def test_dictionaries_of_scores_and_groups_from_metadata(tmp_path):
    a = inspect_log(tmp_path / "a.json", [{"f1": 0.1 * (n % 7), "em": "C" if n % 2 else "I"} for n in range(20)],
                    metadata=lambda n: {"book": n // 4})
    assert set(read_log(a)) == {("t", "match.f1"), ("t", "match.em")}
    assert set(compare_logs(a, a, cluster="book").frame["groups"]) == {5}


BAD_LINES = ["{", "[1]", "7", '{"doc": 1}', '{"doc_id": 1, "metrics": ["acc"], "acc": "high"}', "[" * 5000,
             '{"doc_id": 1}', ""]


@pytest.mark.parametrize("text", BAD_LINES, ids=range(len(BAD_LINES)))
def test_lines_that_are_no_samples(tmp_path, text):
    path = tmp_path / "samples_t.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(DataError, match=r"samples_t\.jsonl"):
        read_log(path)


@pytest.mark.parametrize("stored", [[], {}, {"samples": []}, {"samples": [7]}, {"samples": [{"id": 1}]},
                                    {"samples": [{"id": 1, "scores": {"m": 7}}]},
                                    {"samples": [{"id": 1, "epoch": [], "scores": {"m": {"value": 1}}}]}])
def test_json_that_is_no_inspect_log(tmp_path, stored):
    path = tmp_path / "log.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(DataError, match=r"log\.json"):
        read_log(path)


def test_archives_that_are_none(tmp_path):
    path = tmp_path / "x.eval"
    path.write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match=r"x\.eval is no log of inspect"):
        read_log(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.json", b"\xff\xfe")
    with pytest.raises(DataError, match=r"x\.eval/header\.json is not UTF-8"):
        read_log(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples/1.json", b" " * (64 * 2**20 + 1))
    with pytest.raises(DataError, match="has more than"):
        read_log(path)


def test_nothing_to_compare(tmp_path):
    with pytest.raises(DataError, match="holds no samples_"):
        read_log(tmp_path)
    a = lm_eval(tmp_path / "samples_t.jsonl", [1, 0])
    b = lines(tmp_path / "b" / "samples_t.jsonl", [sample(n, 1.0) for n in (7, 8)])
    with pytest.raises(DataError, match="share no item"):
        compare_logs(a, b)
    other = lines(tmp_path / "c" / "samples_t.jsonl", [sample(0, 1.0, metric="acc")])
    with pytest.raises(DataError, match=r"in common: A has t \(exact_match,strict-match\); B has t "):
        compare_logs(a, other)
    with pytest.raises(SettingsError, match="margin must be more than 0"):
        compare_logs(a, a, margin=-1.0)


def test_the_tidy_table(tmp_path):
    path = lm_eval(tmp_path / "samples_t.jsonl", [1, 0, 1, 1] * 10)
    frame = compare_logs(path, path).table.frame()
    assert frame["side"].tolist() == ["a", "b", "difference"]
    assert frame["value"].tolist() == [0.75, 0.75, 0.0]
    assert frame["task"].tolist() == ["t"] * 3
    assert frame["conclusion"].iloc[2] == "open"
