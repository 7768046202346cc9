"""The faults that a hostile tester found on 2026-11-25, one by one and with others of their kind.

Each runs one command on a copy of the campaign's world after a stated damage; the judge of the campaign says whether it
ended cleanly, and the case says with which exit code and words, or that the result is the undamaged one.
"""

# ruff: noqa: F811  (the fixture is imported by name)
from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign_fixtures import world  # noqa: F401
from campaign_results import run_in
from campaign_world import FAST, IMPORTANCE, ONE, PROFILE, TUNE, Case
from safetensors.torch import load_file, save_file

from campaign import judge, snapshot
from midblock.reading import sealed

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]
Damage = Callable[[Path], object]
_SECONDS = 60.0


@pytest.fixture(scope="module")
def place(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("known")


def assert_ends(world: Path, folder: Path, words: str, damage: Damage, code: int, says: str) -> tuple[Path, str]:
    """Run ``words`` on a damaged copy; returns the copy and all that was printed."""
    import time

    copy = folder / "w"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(world, copy)
    damage(copy)
    before = snapshot(copy)
    began = time.perf_counter()
    found, out, err = run_in(copy, words.split(" "))
    verdict = judge(Case(words.split(" "), "the damaged file"), found, out, err, before, copy,
                    time.perf_counter() - began)
    assert verdict == ("ok" if code == 0 else "refused"), (verdict, out, err)
    assert found == code, (found, out, err)
    assert re.search(says, out + err, re.S), (says, out, err)
    return copy, out + err


def cases(table: list[tuple[str, str, Damage, str]]) -> Any:
    return pytest.mark.parametrize(("words", "damage", "says"), [t[1:] for t in table], ids=[t[0] for t in table])


# ---------------------------------------------------------------------------------------------
# damage


def config(name: str, value: Any, file: str = "m/config.json") -> Damage:
    def damage(place: Path) -> None:
        kept = json.loads((place / file).read_text())
        (place / file).write_text(json.dumps(kept | {name: value}))

    return damage


def text(file: str, content: str | bytes) -> Damage:
    return lambda place: (place / file).write_bytes(content.encode() if isinstance(content, str) else content)


def gone(file: str) -> Damage:
    return lambda place: (place / file).unlink()


def flip(file: str, share: float = 0.7) -> Damage:
    def damage(place: Path) -> None:
        raw = bytearray((place / file).read_bytes())
        raw[int(share * len(raw))] ^= 16
        (place / file).write_bytes(raw)

    return damage


def cut(file: str) -> Damage:
    return lambda place: os.truncate(place / file, (place / file).stat().st_size // 2)


def header(change: Callable[[dict[str, Any], str], object], file: str = "m-sft/model.safetensors") -> Damage:
    def damage(place: Path) -> None:
        raw = (place / file).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        value = json.loads(raw[8:8 + size])
        change(value, next(n for n in value if n.endswith("up_proj.weight")))
        packed = json.dumps(value).encode()
        (place / file).write_bytes(struct.pack("<Q", len(packed)) + packed + raw[8 + size:])

    return damage


def offsets(value: Any) -> Damage:
    return header(lambda h, n: h[n].update(data_offsets=value))


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(place: Path) -> None:
        value = load_file(place / file)
        change(value)
        save_file(value, place / file)

    return damage


def resealed(file: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """An edit whose author wrote the digest anew."""
    def damage(place: Path) -> None:
        value = json.loads((place / file).read_text())
        change(value)
        (place / file).write_text(json.dumps(sealed(value)))

    return damage


def index(value: Any) -> Damage:
    def damage(place: Path) -> None:
        path = place / "shards/model.safetensors.index.json"
        kept = json.loads(path.read_text())
        kept["weight_map"][next(iter(kept["weight_map"]))] = value
        path.write_text(json.dumps(kept))

    return damage


def plan(**changes: Any) -> Damage:
    def damage(place: Path) -> None:
        value = json.loads((place / "plan.json").read_text())
        for module in value["modules"]:
            module.update({k: v for k, v in changes.items() if k in module})
        value.update({k: v for k, v in changes.items() if k in value})
        (place / "plan.json").write_text(json.dumps(value))

    return damage


def row_files(place: Path) -> list[Path]:
    return sorted((place / "rows").rglob("prefix-*/*.safetensors"))


def each_row(change: Callable[[Path], object]) -> Damage:
    def damage(place: Path) -> None:
        assert row_files(place)
        for path in row_files(place):
            change(path)

    return damage


def each_converted(damage: Damage) -> Damage:
    return lambda place: [damage(p) for p in (place / "cache/converted").iterdir() if p.is_dir()]


def nothing(place: Path) -> None:
    pass


WEIGHTS = "weights m m-sft --no-spectra --quiet --out out"
LENS = f"lens m m-sft --data d.jsonl {FAST}"
PLAN = f"{ONE} --plan plan.json --data d.jsonl"
CACHED = f"{TUNE} --steps 2 --cache disk:rows --out out"
RESUMED = f"{TUNE} --steps 6 --save-steps 1 --out stopped/tune --resume"
GGUF = "weights tiny.gguf tiny.gguf --no-spectra --quiet --out out"
SWEEP = "sweep sweep.yaml --out runs/sweep --resume --quiet"
DRY = "sweep sweep.yaml --dry-run"
OVERLAP = "overlap runs/importance-0 runs/importance-1 --quiet --out out"
ADAPTED = f"evaluate m --adapter adapter --task perplexity --data d.jsonl {FAST}"
RESULT = "runs/sweep/results/00100__lr0.01__seed1.json"


# ---------------------------------------------------------------------------------------------
# data loss and silently wrong results


def _big(place: Path) -> None:
    (place / "mm" / "llama").mkdir(parents=True)
    with (place / "mm" / "llama" / "model.safetensors").open("wb") as file:
        file.truncate(21 << 30)


@pytest.mark.parametrize("words", [f"{TUNE} --steps 1 --cache disk:mm --out out",
                                   f"{TUNE} --steps 1 --cache disk:mm --cache-limit 1K --out out",
                                   "sweep sweep.yaml --set cache=disk:mm --quiet --out out"])
def test_a_cache_never_takes_a_folder_of_other_files(world: Path, place: Path, words: str) -> None:
    copy, _ = assert_ends(world, place, words, _big, 2, "mm holds files that no prefix cache made")
    assert (copy / "mm/llama/model.safetensors").stat().st_size == 21 << 30


def test_a_full_cache_removes_its_own_rows_only(world: Path, place: Path) -> None:
    names = ("rows/llama/model.safetensors", "rows/prefix-mine/x.safetensors", "rows/notes.txt")

    def damage(place: Path) -> None:
        for name in names:
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text("mine")
        (row_files(place)[0].parent / "mine.safetensors").write_text("mine")

    words = TUNE.replace("00100", "00010")  # another prefix, for which the old one's rows make room
    words = f"{words} --steps 2 --cache disk:rows --cache-limit 60K --out out"
    copy, _ = assert_ends(world, place, words, damage, 0, "")
    assert [p.name for p in copy.rglob("mine.safetensors")] == ["mine.safetensors"]
    assert all((copy / name).read_text() == "mine" for name in names)


def _other_state(folder: str, name: str) -> Damage:
    def damage(place: Path) -> None:
        shutil.rmtree(place / folder)
        (place / folder).mkdir()
        (place / folder / name).write_text("mine")

    return damage


@cases([
    ("a page", "report runs --out d.csv", nothing, "no page that midblock wrote"),
    ("a table", "figures runs --columns one --quiet --out drawn",
     lambda p: ((p / "drawn").mkdir(), text("drawn/table-1.md", "mine")(p), text("drawn/figure-1.csv", "mine")(p)),
     r"figure-1\.csv is there, and is not as midblock wrote it"),
    ("an exported adapter with notes", f"{TUNE} --steps 2 --out runs/tune --cache disk:rows --resume",
     text("runs/tune/adapter/notes.txt", "mine"), r"notes\.txt is not as midblock wrote it"),
    ("an exported adapter with another card", f"{TUNE} --steps 2 --out runs/tune --cache disk:rows --resume",
     text("runs/tune/adapter/README.md", "mine"), r"README\.md is not as midblock wrote it"),
    ("parts of a model as state", f"{PROFILE} --out stopped/profile --resume",
     _other_state("stopped/profile/state", "part-00000.safetensors"), "no interrupted run of midblock left"),
    ("a file as state", f"{IMPORTANCE} --out stopped/importance --resume",
     _other_state("stopped/importance/state", "importance.safetensors"), "no interrupted run of midblock left"),
])
def test_files_of_others_are_not_replaced(world: Path, place: Path, words: str, damage: Damage, says: str) -> None:
    before: dict[Path, bytes] = {}

    def seen(copy: Path) -> None:
        damage(copy)
        before.update({p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and (
            p.read_bytes() == b"mine" or p.name == "d.csv")})

    assert_ends(world, place, words, seen, 2, says)
    assert before
    assert all(p.read_bytes() == content for p, content in before.items())


def _exchange(place: Path) -> None:
    first, second = row_files(place)[:2]
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


@cases([
    ("bits flipped", CACHED, each_row(lambda p: flip(p.name)(p.parent)), "8 rows of the prefix cache.* were damaged"),
    ("rows exchanged", CACHED, _exchange, "2 rows of the prefix cache.* were damaged"),
    ("wrong width", CACHED, each_row(lambda p: save_file({"hidden": torch.ones(3, 7)}, p)), "8 rows of the prefix"),
    ("NaN", CACHED, each_row(lambda p: save_file({"hidden": torch.full((32, 32), float("nan"))}, p)), "8 rows of the"),
    ("cut", CACHED, each_row(lambda p: os.truncate(p, 100)), "8 rows of the prefix cache.* were damaged"),
    ("empty", CACHED, each_row(lambda p: p.write_bytes(b"")), "8 rows of the prefix cache.* were damaged"),
    ("last checkpoint's adapter flipped", RESUMED,
     lambda p: flip("adapter_model.safetensors")(sorted((p / "stopped/tune/checkpoints").glob("checkpoint-*"))[-1]),
     "was not used: adapter_model.safetensors is not what was written"),
    ("last checkpoint's adapter cut", RESUMED,
     lambda p: cut("adapter_model.safetensors")(sorted((p / "stopped/tune/checkpoints").glob("checkpoint-*"))[-1]),
     "was not used: adapter_model.safetensors is not what was written"),
    ("last checkpoint's optimizer gone", RESUMED,
     lambda p: gone("optimizer.safetensors")(sorted((p / "stopped/tune/checkpoints").glob("checkpoint-*"))[-1]),
     "was not used: optimizer.safetensors is not what was written"),
    *[(f"blocks {name}", RESUMED, damage, "") for name, damage in (
        ("gone", gone("stopped/tune/checkpoints/blocks.jsonl")), ("cut", cut("stopped/tune/checkpoints/blocks.jsonl")),
        ("binary", text("stopped/tune/checkpoints/blocks.jsonl", bytes(range(256)))),
        ("of another shape", text("stopped/tune/checkpoints/blocks.jsonl", '[]\n{"step": "x"}\n')))],
    *[(f"converted GGUF: {name}", GGUF, each_converted(damage), "is damaged.*is converted again") for name, damage in (
        ("weights flipped", flip("model.safetensors")), ("weights cut", cut("model.safetensors")),
        ("weights gone", gone("model.safetensors")), ("config edited", config("rms_norm_eps", 0.5, "config.json")),
        ("tokenizer gone", gone("tokenizer.json")), ("mark edited", text("midblock.json", "{}")))],
    ("steps gone", RESUMED, gone("stopped/tune/checkpoints/steps.jsonl"), ""),
    ("steps empty", RESUMED, text("stopped/tune/checkpoints/steps.jsonl", ""), ""),
    ("steps binary", RESUMED, text("stopped/tune/checkpoints/steps.jsonl", bytes(range(256))), ""),
    ("progress of importance flipped", f"{IMPORTANCE} --out stopped/importance --resume",
     flip("stopped/importance/state/importance.safetensors"), "learned anew"),
    ("a part of a profile flipped", f"{PROFILE} --out stopped/profile --resume",
     lambda p: [flip(q.name, 0.95)(q.parent) for q in (p / "stopped/profile").rglob("part-*.safetensors")],
     "run again"),
])
def test_damaged_saved_work_is_said_and_done_again(world: Path, place: Path, words: str, damage: Damage,
                                                   says: str) -> None:
    from campaign_cycles import differences
    from campaign_world import COMMANDS

    copy, _ = assert_ends(world, place, words, damage, 0, says)
    number = [command for command, _ in COMMANDS].index(words)
    out = words.split("--out ")[1].split()[0]
    assert differences(world.parent / "references" / str(number) / out, copy / out) == []


@cases([
    ("two tensors at one offset", WEIGHTS, offsets([0, 8192]), "safetensors refuses it"),
    ("offsets reversed", WEIGHTS, offsets([8192, 0]), "safetensors refuses it"),
    ("offsets fractional", WEIGHTS, offsets([0.5, 8192.5]), "safetensors refuses it"),
    ("offsets negative", WEIGHTS, offsets([-8192, 0]), "safetensors refuses it"),
    ("offsets text", WEIGHTS, offsets(["0", "8192"]), "safetensors refuses it"),
    ("shape text", WEIGHTS, header(lambda h, n: h[n].update(shape="64x32")), "safetensors refuses it"),
    ("shape negative", WEIGHTS, header(lambda h, n: h[n].update(shape=[-64, -32])), "safetensors refuses it"),
    ("int32 weights", LENS, header(lambda h, n: h[n].update(dtype="I32")), "holds I32 numbers.*not weights"),
    ("uint8 weights", LENS, tensors("m-sft/model.safetensors", lambda t: t.update(
        {n: v.to(torch.uint8) for n, v in t.items() if "up_proj" in n})), "holds U8 numbers.*not weights"),
    ("overlap of an unfinished run", "overlap stopped/importance runs/importance-1 --quiet --out out", nothing,
     "is not finished"),
    ("validation by an unfinished sweep", "locate --validate stopped/sweep --quiet --out out", nothing, "not finished"),
    ("a plan of another depth", PLAN, plan(block=99), "plan"),
    ("a plan with a module that is not there", PLAN, plan(name="model.layers.9.mlp.up_proj"), "plan"),
    ("a score edited", SWEEP, lambda p: text(RESULT, (p / RESULT).read_text().replace("1", "2", 1))(p), "was changed"),
    ("an index that leaves its folder", "inspect shards", index("../m/model.safetensors"), "same folder"),
    ("an index with an absolute path", "inspect shards", index("/etc/passwd"), "same folder"),
    ("a pickled adapter", ADAPTED, lambda p: torch.save(load_file(p / "adapter/adapter_model.safetensors"),
     p / "adapter/adapter_model.bin") or gone("adapter/adapter_model.safetensors")(p), "--allow-pickle"),
    ("a pickled adapter beside the model", LENS, lambda p: [
        shutil.copy(p / "adapter/adapter_config.json", p / "m"), torch.save({}, p / "m/adapter_model.bin")],
     "--allow-pickle"),
    ("a flipped summary of a run", "correlate runs/profile runs/weights --quiet --out out",
     flip("runs/profile/table.csv"), "table.csv was changed"),
])
def test_what_was_taken_silently_is_refused(world: Path, place: Path, words: str, damage: Damage,
                                            says: str) -> None:
    assert_ends(world, place, words, damage, 2, says)


# ---------------------------------------------------------------------------------------------
# tracebacks

CONFIGS: list[tuple[str, Any]] = [
    ("num_attention_heads", 3), ("num_attention_heads", 0), ("num_hidden_layers", "4"), ("num_hidden_layers", 10**9),
    ("num_hidden_layers", None), ("vocab_size", 0), ("pad_token_id", 5000), ("hidden_act", "nosuch"),
    ("attn_implementation", 5), ("_attn_implementation", "nosuch"), ("hidden_size", [32]), ("rms_norm_eps", "x"),
    ("rope_parameters", 7), ("eos_token_id", {"a": 1}), ("architectures", "Llama"), ("model_type", ["llama"]),
    ("model_type", "\x1b[31mred\nError: forged"), ("num_key_value_heads", 3), ("max_position_embeddings", -5),
    ("dtype", "nosuch"), ("tie_word_embeddings", "maybe"), ("layer_types", "x")]


@pytest.mark.parametrize(("name", "value"), CONFIGS)
def test_fields_of_a_config(world: Path, place: Path, name: str, value: Any) -> None:
    _, told = assert_ends(world, place, LENS, config(name, value), 2, "Error: ")
    assert "\x1b" not in told


DEEP = [("[" * n + "]" * n) for n in (5_000, 100_000)]
ADAPTER = "adapter/adapter_config.json"


@cases([
    ("an unknown tracker", f"{ONE} --mask 00100 --rank 2 --data d.jsonl --report-to nosuch", nothing, "nosuch"),
    *[(f"seed {n}", f"{ONE} --mask 00100 --rank 2 --data d.jsonl --seed {n}", nothing, "seed")
      for n in (2**32, 2**64, 10**30, -(2**63) - 1)],
    *[(f"{option} of forty digits", f"{ONE} --mask 00100 --rank 2 --data d.jsonl {option} {'1' * 40}", nothing,
       f"{option} must be at most") for option in ("--steps", "--rank", "--batch-size", "--samples")],
    ("a table without a column", OVERLAP, lambda p: text("runs/importance-0/table.csv", "\n".join(
        line.split(",", 1)[1] for line in (p / "runs/importance-0/table.csv").read_text().splitlines()))(p), "changed"),
    ("a table cut", OVERLAP, cut("runs/importance-0/table.csv"), "changed"),
    *[(f"run.json is {t}", OVERLAP, text("runs/importance-0/run.json", t), "run.json")
      for t in ("[]", "5", "null", '"x"', "{}", "", '{"status": 5, "digest": "x"}')],
    ("run.json of wrong types, sealed", OVERLAP, resealed("runs/importance-0/run.json",
                                                          lambda v: v.update(settings=[], models=5)), "run.json"),
    *[(f"a result is {t[:20]}", SWEEP, text(RESULT, t), "seed1.json")
      for t in ("null", "{}", '{"scores": "x"}', "[1]")],
    *[(f"sealed {k} = {x!r}", SWEEP, resealed(RESULT, lambda v, k=k, x=x: v["tasks"]["answers"].update({k: x})),
       "seed1.json") for k, x in (("metric", 5), ("items", "x"), ("items", None), ("higher_is_better", "maybe"))],
    ("sealed tasks of another type", SWEEP, resealed(RESULT, lambda v: v.update(tasks=[1])), "seed1.json"),
    *[(f"an index value {v!r}", "inspect shards", index(v), "name of a file") for v in ([], 5, None, {}, True, "")],
    *[(f"adapter {n} = {v!r}", ADAPTED, config(n, v, ADAPTER), "adapter")
      for n, v in (("base_model_name_or_path", 7), ("base_model_name_or_path", []), ("lora_alpha", "x"), ("r", -1),
                   ("target_modules", 5), ("peft_type", []), ("rank_pattern", [1]))],
    ("an adapter that is a list", ADAPTED, text(ADAPTER, "[]"), "adapter_config.json"),
    ("an adapter without a half", ADAPTED, tensors("adapter/adapter_model.safetensors",
                                                   lambda t: t.pop(next(n for n in t if "lora_B" in n))), "other half"),
    *[(f"YAML {y[:20]!r}", DRY, text("sweep.yaml", y), "sweep.yaml")
      for y in ("? [a, b]\n: 1\n", "? {a: 1}\n: 2\n", "seeds: !!int \"x\"\n", f"seeds: [{'9' * 5000}]\n", *DEEP,
                "{a: " * 5000, "a: &a [*a]\n")],
    *[(f"JSON of {len(d) // 2} levels", "inspect m", text("m/config.json", d), "nested too deeply") for d in DEEP],
    ("data of 5,000 digits", LENS, text("d.jsonl", f'{{"text": "a b c", "n": {"9" * 5000}}}\n'), "digits"),
    ("data of 5,000 levels", LENS, text("d.jsonl", f'{{"text": "a b c", "n": {DEEP[0]}}}\n'), "nested too deeply"),
    *[(f"plan of rank {r}", PLAN, plan(rank=r), "rank") for r in (-1, "x", 1e9, 0, None, [2])],
    ("an empty plan", PLAN, plan(modules=[]), "plan"),
    ("an empty plan file", PLAN, text("plan.json", ""), "plan.json"),
    ("a path too long", f"lens m --data {'a/' * 2500}x.jsonl {FAST}", nothing, "too long"),
    ("a name too long", f"lens {'a' * 300} --data d.jsonl {FAST}", nothing, "a{20}"),
    ("no such user", f"lens m --data ~nosuchuser/x.jsonl {FAST}", nothing, "no user"),
    ("a NUL", f"lens m --data a\0b.jsonl {FAST}", nothing, "NUL"),
    ("undecodable", f"lens m --data a\udcff.jsonl {FAST}", nothing, "UTF-8"),
    *[(f"alpha {v}", f"{ONE} --mask 00100 --rank 2 --data d.jsonl --alpha {v}", nothing, "alpha")
      for v in ("nan", "inf", "-1")],
    *[(f"eps {v}", f"profile m m-sft --data d.jsonl --sparsity-eps {v} {FAST}", nothing, "sparsity-eps")
      for v in ("nan", "-1", "inf")],
    *[(f"replicates {v}", f"profile m m-sft --data d.jsonl --replicates {v} {FAST}", nothing, "replicates")
      for v in ("1e9", "1000000000", "-1")],
])
def test_what_ended_in_a_traceback_is_one_line(world: Path, place: Path, words: str, damage: Damage,
                                               says: str) -> None:
    assert_ends(world, place, words, damage, 2, says)


# ---------------------------------------------------------------------------------------------
# time, memory, terminal


def _zip_line(place: Path) -> None:
    with gzip.open(place / "d.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"a" * (1 << 20))


def _pipe(name: str) -> Damage:
    return lambda p: ((p / name).unlink(), os.mkfifo(p / name))


def _zero(name: str) -> Damage:
    return lambda p: ((p / name).unlink(), (p / name).symlink_to("/dev/zero"))


def _draws(place: Path) -> None:
    value = json.loads((place / "sweep.yaml").read_text())
    value["arms"]["random"] = [{"blocks": 2, "draws": 1_000_000}]
    (place / "sweep.yaml").write_text(json.dumps(value))


@cases([
    ("a model of 999,999 blocks in run.json", "correlate runs/profile runs/weights --quiet --out out",
     resealed("runs/profile/run.json", lambda v: [m.update(blocks=999_999) for m in v["models"].values()]), "blocks"),
    ("a million random draws", DRY, _draws, "random"),
    ("a long line in a small gzip", f"lens m --data d.jsonl.gz {FAST}", _zip_line, "more than [0-9,]+ bytes"),
    *[(f"a pipe as {n}", w, _pipe(n), "regular file|no config.json")
      for n, w in (("d.jsonl", LENS), ("m/config.json", "inspect m"), ("sweep.yaml", DRY), ("plan.json", PLAN))],
    *[(f"/dev/zero as {n}", w, _zero(n), "regular file|no config.json")
      for n, w in (("d.jsonl", LENS), ("m/config.json", "inspect m"), ("sweep.yaml", DRY), ("plan.json", PLAN))],
    ("importance of budget 0", f"{IMPORTANCE} --apply top:0.3 --budget 0 --out out", nothing, "budget"),
    ("importance of budget -5", f"{IMPORTANCE} --apply top:0.3 --budget -5 --out out", nothing, "budget"),
    ("a forged error in a file's name", f"lens m --data \x1b[31m\nError:forged.jsonl {FAST}", nothing, r"\\x1b"),
    ("a forged error in an index", "weights m shards --no-spectra --quiet --out out", index("\x1b[31m\nError: forged"),
     "x1b|same folder|missing"),
    ("a forged error in a metric", "correlate runs/profile runs/weights --quiet --out out --metrics \x1b[31m\nError:x",
     nothing, r"\\x1b"),
])
def test_what_hung_or_reached_the_terminal_is_one_line(world: Path, place: Path, words: str, damage: Damage,
                                                       says: str) -> None:
    assert_ends(world, place, words, damage, 2, says)


def test_a_mask_of_100001_digits_in_a_table(world: Path, place: Path) -> None:
    def damage(place: Path) -> None:
        import hashlib

        path = place / "runs/sweep/table.csv"
        path.write_text(path.read_text().replace("00100", "01" * 50_000 + "0"))
        resealed("runs/sweep/run.json", lambda v: v["digests"].update(
            {"table.csv": hashlib.sha256(path.read_bytes()).hexdigest()}))(place)

    assert_ends(world, place, "locate --validate runs/sweep --quiet --out out", damage, 2, "no score of 00100")


def test_a_file_of_too_many_rows(world: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDBLOCK_MAX_ROWS", "20000")
    assert_ends(world, place, LENS, text("d.jsonl", '{"text": "a b c d"}\n' * 20_001), 2, "more than 20,000 rows")
