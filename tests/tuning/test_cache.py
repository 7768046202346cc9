"""The prefix cache: it removes only what it made, gives back only what it was given, and keeps its limit."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from families import FAMILIES
from midblock.cli.app import run
from midblock.errors import MidblockError, OutputError, SettingsError
from midblock.models import save_checkpoint
from midblock.removing import TEMPORARY
from midblock.sizes import parse_bytes
from midblock.tuning import PrefixCache
from midblock.tuning.cache_folder import MARKER


def disk(folder: Path, limit: int | str | None = None) -> PrefixCache:
    return PrefixCache("disk", folder=folder, limit_bytes=limit)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("prefix-*/*.safetensors"))


# ---------------------------------------------------------------------------------------------
# whose files they are


FOREIGN = {
    "a model": "llama/model.safetensors",
    "an adapter beside it": "adapter_model.safetensors",
    "a cache of the format before": f"{'0' * 64}/{'1' * 64}.safetensors",
    "a hidden file": ".notes",
    "rows without a marker": f"prefix-{'0' * 64}/{'1' * 32}-{'2' * 64}.safetensors",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_holds_something_else_is_refused_untouched(name: str, tmp_path: Path) -> None:
    target = tmp_path / "mine" / FOREIGN[name]
    target.parent.mkdir(parents=True)
    save_file({"w": torch.ones(4)}, target)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"no prefix cache made.*new folder"):
        disk(tmp_path / "mine", 1)
    assert tree(tmp_path) == before


def test_what_others_put_into_a_marked_folder_stays(tmp_path: Path) -> None:
    folder, outside = tmp_path / "cache", tmp_path / "models"
    first = disk(folder)
    for i in range(3):
        first.put("old", str(i), torch.ones(50, 8) * i)
    space = rows_of(folder)[0].parent
    outside.mkdir()
    save_file({"w": torch.ones(999)}, outside / "model.safetensors")
    own = rows_of(folder)[0].name
    save_file({"w": torch.ones(999)}, outside / own)  # even under the name of a row
    planted = [folder / "llama" / "model.safetensors", space / "model.safetensors", folder / own,
               folder / ("0" * 64) / own, space / f"{'f' * 32}-{'0' * 64}.safetensors"]
    for path in planted:
        path.parent.mkdir(exist_ok=True)
        save_file({"w": torch.ones(999)}, path)
    (folder / f"prefix-{'a' * 64}").symlink_to(outside, target_is_directory=True)
    (space / f"{own.split('-')[0]}-{'b' * 64}.safetensors").symlink_to(outside / "model.safetensors")
    before = {p: p.read_bytes() for p in (*planted, outside / "model.safetensors", outside / own)}
    small = disk(folder, "3K")
    small.put("new", "0", torch.ones(50, 8))  # "old" must go for it
    assert all(small.get("old", str(i)) is None for i in range(3))
    assert small.get("new", "0") is not None
    small.clear()
    assert len(small) == small.bytes == 0
    assert {p: p.read_bytes() for p in before} == before


def test_nothing_is_made_before_something_is_kept(tmp_path: Path) -> None:
    disk(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    cache = disk(tmp_path / "a" / "b")
    cache.put("n", "k", torch.ones(2, 2))
    marker = json.loads((tmp_path / "a" / "b" / MARKER).read_text())
    assert marker["format"] == 2
    assert all(p.name.startswith(marker["id"]) for p in rows_of(tmp_path / "a" / "b"))


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"format": 2}', '{"format": "2", "id": "x"}', "[" * 90000,
                                     '{"format": 2, "id": "../../../../etc"}', "\x00", '{"format": 99, "id": "%s"}'])
def test_markers_that_say_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text(content.replace("%s", "0" * 32))
    with pytest.raises(OutputError, match="new folder"):
        disk(tmp_path)


@pytest.mark.parametrize("folder", ["x" * 5000, "~nosuchuser-here/x", "a\0b"])
def test_folders_that_cannot_be(folder: str) -> None:
    with pytest.raises(OutputError, match=r"too long|no user|NUL"):
        PrefixCache.from_spec(f"disk:{folder}")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError):
            disk(path).put("n", "k", torch.ones(2, 2))
    assert (tmp_path / "file").read_text() == "x"


# ---------------------------------------------------------------------------------------------
# what comes back is what was put in


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**9), bit=st.integers(0, 7), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_a_flipped_bit_is_a_miss(place: int, bit: int, dtype: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("flip")
    row = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    disk(folder).put("n", "k", row)
    (path,) = rows_of(folder)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    cache = disk(folder)
    found = cache.get("n", "k")
    # a bit of the header's padding changes nothing; any other must be noticed
    assert (cache.hits, cache.misses, cache.damaged) in ((0, 1, 1), (1, 0, 0))
    if found is not None:
        assert torch.equal(found, row)
        return
    assert not path.exists()
    cache.put("n", "k", row)
    again = cache.get("n", "k")
    assert again is not None
    assert torch.equal(again, row)


def exchange(folder: Path) -> None:
    one, two, *_ = rows_of(folder)
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


def into_a_folder(folder: Path) -> None:
    path = rows_of(folder)[0]
    path.unlink()
    path.mkdir()


def rewrite(folder: Path, change: Any) -> None:
    from safetensors import safe_open

    path = rows_of(folder)[0]
    with safe_open(path, framework="pt") as stored:
        said = stored.metadata()
    save_file({"hidden": change(load_file(path)["hidden"])}, path, metadata=said)


DAMAGE = {
    "cut": lambda f: rows_of(f)[0].write_bytes(rows_of(f)[0].read_bytes()[:-3]),
    "cut in the header": lambda f: rows_of(f)[0].write_bytes(rows_of(f)[0].read_bytes()[:20]),
    "empty": lambda f: rows_of(f)[0].write_bytes(b""),
    "zeros": lambda f: rows_of(f)[0].write_bytes(bytes(len(rows_of(f)[0].read_bytes()))),
    "exchanged": exchange,
    "another width": lambda f: rewrite(f, lambda t: t[:, :-1].contiguous()),
    "fewer tokens": lambda f: rewrite(f, lambda t: t[:-1].contiguous()),
    "another dtype": lambda f: rewrite(f, lambda t: t.to(torch.bfloat16)),
    "turned": lambda f: rewrite(f, lambda t: t.view(6, 5)),
    "not a number": lambda f: rewrite(f, lambda t: t * float("nan")),
    "without its header": lambda f: save_file(load_file(rows_of(f)[0]), rows_of(f)[0]),
    "another name inside": lambda f: save_file({"other": torch.ones(5, 6)}, rows_of(f)[0]),
    "a folder": into_a_folder,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_rows_are_misses_and_counted(name: str, tmp_path: Path) -> None:
    rows = [torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    first = disk(tmp_path)
    for i, row in enumerate(rows):
        first.put("n", str(i), row)
    want = rows_of(tmp_path)
    DAMAGE[name](tmp_path)
    cache = disk(tmp_path)
    found = [cache.get("n", str(i)) for i in range(3)]
    lost = [i for i, f in enumerate(found) if f is None]
    assert len(lost) == cache.damaged == (2 if name == "exchanged" else 1) == cache.misses
    assert all(torch.equal(f, rows[i]) for i, f in enumerate(found) if f is not None)
    assert cache.describe()["damaged"] == len(lost)
    if name != "a folder":
        for i in lost:
            cache.put("n", str(i), rows[i])
        assert rows_of(tmp_path) == want
        assert all(torch.equal(x, rows[i]) for i in lost if (x := cache.get("n", str(i))) is not None)


def test_rows_that_are_expected_are_what_a_plain_read_gives(tmp_path: Path) -> None:
    rows = [torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    first = disk(tmp_path)
    for i, row in enumerate(rows[:3]):
        first.put("n", str(i), row)
    DAMAGE["cut"](tmp_path)
    plain = disk(tmp_path)
    want = [plain.peek("n", str(i)) for i in range(3)]
    for i, row in enumerate(rows[:3]):  # the damaged one is gone, and comes again
        first.put("n", str(i), row)
    DAMAGE["cut"](tmp_path)
    cache = disk(tmp_path)
    cache.expect("n", ["0", "1", "2", "3"])
    cache.expect("n", ["1", "0", "2", "3"])  # in another order, and once more
    first.put("n", "3", rows[3])  # it was not there when it was looked for
    got = [cache.get("n", str(i)) for i in range(4)]
    assert [g is None for g in got] == [w is None for w in want] + [False]
    assert sum(g is None for g in got) == cache.damaged == cache.misses == 1
    assert all(torch.equal(g, rows[i]) for i, g in enumerate(got) if g is not None)
    for keys in (["0"], [], []):  # nothing is kept of what is not asked for
        cache.expect("n", keys)
    assert not any(cache._coming)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_row_of_another_shape_than_is_due_is_a_miss(kind: str, tmp_path: Path) -> None:
    cache = PrefixCache() if kind == "memory" else disk(tmp_path)
    cache.put("n", "k", torch.ones(3, 4))
    assert cache.get("n", "k", (3, 4)) is not None
    assert cache.get("n", "k", (4, 4)) is None
    assert cache.get("n", "k") is None  # it is gone
    assert (cache.damaged, cache.bytes) == (1, 0)


# ---------------------------------------------------------------------------------------------
# the limit


def on_disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in rows_of(folder))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(1, 6000), puts=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5),
                                                           st.integers(1, 60)), max_size=25),
       kind=st.sampled_from(["memory", "disk"]))
def test_no_sequence_of_rows_passes_the_limit(limit: int, puts: list[tuple[str, int, int]], kind: str,
                                              tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("limit")
    cache = PrefixCache(limit_bytes=limit) if kind == "memory" else disk(folder, limit)
    for space, key, tokens in puts:
        cache.put(space, f"{key}-{tokens}", torch.ones(tokens, 8))
        assert cache.bytes <= limit
        if kind == "disk":
            assert on_disk(folder) == cache.bytes
    cache.clear()
    assert cache.bytes == len(cache) == on_disk(folder) == 0


def _fill(folder: str, number: int, limit: int) -> None:
    cache = disk(Path(folder), limit)
    for i in range(30):
        cache.put(f"space {number % 2}", f"{number} {i}", torch.ones(20, 8) * i)


def test_processes_keep_the_limit_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    limit = 12_000
    workers = [context.Process(target=_fill, args=(str(tmp_path / "cache"), n, limit)) for n in range(3)]
    for worker in workers:
        worker.start()
    lock = FileLock(tmp_path / "cache" / ".midblock-prefix-cache.lock")
    while any(w.is_alive() for w in workers):
        if (tmp_path / "cache" / MARKER).exists():
            with lock:  # a sum over files that come and go is of no one moment
                assert on_disk(tmp_path / "cache") <= limit
    assert all(w.exitcode == 0 for w in workers)
    cache = disk(tmp_path / "cache", limit)
    assert 0 < on_disk(tmp_path / "cache") == cache.bytes <= limit


def test_a_total_that_a_crash_cut_short_is_counted_anew(tmp_path: Path) -> None:
    cache = disk(tmp_path)
    cache.put("n", "1", torch.ones(9, 9))
    for content in ("", "x"):
        (tmp_path / ".midblock-prefix-cache.bytes").write_text(content)
        assert cache.bytes == on_disk(tmp_path)
    (tmp_path / ".midblock-prefix-cache.bytes").write_text("99999999999")
    again = disk(tmp_path)
    again.put("n", "2", torch.ones(9, 9))
    assert again.bytes == on_disk(tmp_path)


def _die_half_way(folder: str) -> None:
    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        os._exit(9)

    Path.write_bytes = half  # type: ignore[method-assign,assignment]
    disk(Path(folder)).put("n", "2", torch.ones(9, 9))


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    disk(tmp_path).put("n", "1", torch.ones(9, 9))
    (tmp_path / ".mine").write_text("mine")
    worker = multiprocessing.get_context("fork").Process(target=_die_half_way, args=(str(tmp_path),))
    worker.start()
    worker.join()
    space = rows_of(tmp_path)[0].parent
    assert worker.exitcode == 9
    assert [p.name.startswith(TEMPORARY) for p in sorted(space.iterdir())] == [True, False]
    again = disk(tmp_path)
    assert again.get("n", "1") is not None
    again.put("n", "3", torch.ones(9, 9))
    assert len(list(space.iterdir())) == 2
    assert again.bytes == on_disk(tmp_path)
    assert (tmp_path / ".mine").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        disk(tmp_path / "ro" / "cache")


def test_a_disk_that_is_full_costs_the_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = disk(tmp_path)
    cache.put("n", "1", torch.ones(4, 4))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        cache.put("n", "2", torch.ones(4, 4))
    assert cache.refused_bytes == 64
    assert cache.get("n", "2") is None
    assert cache.get("n", "1") is not None


@pytest.mark.parametrize("size", ["9" * 5000, "1e9", "\u0663GB", "0.0000", "-1", "1.5.5G", "nan", "inf", "4XB"])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(SettingsError):
        parse_bytes(size)


# ---------------------------------------------------------------------------------------------
# the commands


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_tune_never_empties_a_folder_of_models(tmp_path: Path, tiny_tokenizer: Any,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    base = save_checkpoint(FAMILIES["llama"](), tiny_tokenizer, tmp_path / "base")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {i}: ", "completion": f"it is {i}"}) + "\n" for i in range(8)))
    mine = tmp_path / "mm" / "llama"
    mine.mkdir(parents=True)
    with (mine / "model.safetensors").open("wb") as file:
        file.truncate(21 << 30)  # takes no space
    words = ["tune", str(base), "--data", str(data), "--dtype", "float32", "--quiet", "--mask", "0010", "--rank", "2",
             "--steps", "4", "--batch-size", "2", "--learning-rate", "1e-2"]
    assert run([*words, "--cache", f"disk:{tmp_path / 'mm'}", "--out", str(tmp_path / "one")]) == 2
    assert "no prefix cache made" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()
    assert (mine / "model.safetensors").stat().st_size == 21 << 30
    cache = tmp_path / "cache"
    assert run([*words, "--cache", f"disk:{cache}", "--out", str(tmp_path / "two")]) == 0
    want = (tmp_path / "two" / "adapter" / "adapter_model.safetensors").read_bytes()
    # all of them: rows that are computed in other company than before may differ in their last bits
    for path in rows_of(cache):
        content = bytearray(path.read_bytes())
        content[-1] ^= 64
        path.write_bytes(content)
    capsys.readouterr()
    assert run([*words, "--cache", f"disk:{cache}", "--out", str(tmp_path / "three")]) == 0
    assert (tmp_path / "three" / "adapter" / "adapter_model.safetensors").read_bytes() == want
    found = json.loads((tmp_path / "three" / "run.json").read_text())["results"]
    assert found["training"]["prefix"]["rows_damaged"] == 8
    assert any("8 rows of the prefix cache" in note for note in found["notes"])
    assert "were damaged and computed anew" in " ".join(capsys.readouterr().out.split())


def test_a_sweep_refuses_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    from midblock.sweeps.config import parse_config

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    values = {"model": "smollm2", "train": {"data": "arithmetic"}, "training": {"steps": 1},
              "arms": {"masks": ["10"]}, "evaluation": [{"task": "arithmetic"}], "cache": f"disk:{tmp_path / 'mine'}"}
    with pytest.raises(MidblockError, match=r"cache: .*thesis\.tex"):
        parse_config(values)
    parse_config({**values, "cache": f"disk:{tmp_path / 'new'}"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
