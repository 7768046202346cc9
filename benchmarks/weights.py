"""Weight change against the machine's own sequential read of the same files.

    python benchmarks/weights.py                        synthetic pair of 2 x 2 GB, and SmolLM2
    python benchmarks/weights.py --gigabytes 4 --dir /scratch
    python benchmarks/weights.py --pair BASE SFT        a pair of your own

Every round reads the files once with plain `readinto` (4 MiB at a time, one thread) and once with
`midblock.analysis.weights`, with the files dropped from the page cache before each ("disk"), then both
again with the files held ("memory"). The best of the rounds counts on both sides. Each measurement
runs in a process of its own, whose resident memory before and at its peak is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUFFER = 4 << 20
# what is measured in a process of its own must not start with torch in it, so _common is imported where tables are
# printed; and profile.py beside this script must not hide the standard library's module, which torch imports
if sys.argv[1:2] == ["--measure"]:
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]


def files_of(*folders: Path) -> list[Path]:
    """Safetensors files of checkpoints."""
    return sorted(p for folder in folders for p in folder.glob("*.safetensors"))


def drop_from_cache(files: list[Path]) -> bool:
    """Ask the system to forget the files' pages; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return True


def read_plainly(files: list[Path]) -> float:
    """Seconds that reading all files from beginning to end takes."""
    buffer = bytearray(BUFFER)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MB; NaN where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return math.nan


def measure(what: str, base: Path, sft: Path) -> None:
    """Run one side in this process and print what it took as JSON."""
    files = files_of(base, sft)
    if what == "read":
        before = resident("VmRSS")
        seconds = read_plainly(files)
    else:
        from midblock.analysis.weights import weights

        before = resident("VmRSS")
        start = time.perf_counter()
        # what decomposes matrices is arithmetic, not reading
        weights(base, sft, spectra=False, workers=1 if what == "weights1" else None)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "before": before, "peak": resident("VmHWM")}))


def in_process(what: str, base: Path, sft: Path) -> dict[str, float]:
    """The same in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--measure", what, str(base), str(sft)], check=True,
                          capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_pair(folder: Path, gigabytes: float) -> tuple[Path, Path]:
    """A Llama-like bfloat16 pair of that size each, in shards of about 1 GB, with random weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    width, inner, vocabulary = 2048, 5632, 32000
    generator = torch.Generator().manual_seed(0)
    block = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width // 4, width),
             "self_attn.v_proj": (width // 4, width), "self_attn.o_proj": (width, width),
             "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
             "input_layernorm": (width,), "post_attention_layernorm": (width,)}
    block_bytes = 2 * sum(math.prod(shape) for shape in block.values())
    ends = 2 * 2 * vocabulary * width
    blocks = max(1, round((gigabytes * 1e9 - ends) / block_bytes))
    config = LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, vocab_size=vocabulary,
                         num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=False,
                         architectures=["LlamaForCausalLM"], dtype="bfloat16")
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width),
              "model.norm.weight": (width,)}
    shapes |= {f"model.layers.{b}.{name}.weight": shape for b in range(blocks) for name, shape in block.items()}
    per_shard = max(1, blocks // math.ceil(gigabytes))
    shards: dict[int, list[str]] = {}
    for name in shapes:
        number = int(name.split(".")[2]) // per_shard + 1 if ".layers." in name else 0
        shards.setdefault(number, []).append(name)
    folders = folder / "base", folder / "sft"
    for path in folders:
        path.mkdir(parents=True)
        config.save_pretrained(path)
    weight_map = {}
    for number, names in sorted(shards.items()):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        values = {n: (0.02 * torch.randn(shapes[n], generator=generator)).bfloat16() for n in names}
        save_file(values, folders[0] / file)
        save_file({n: v * 1.01 for n, v in values.items()}, folders[1] / file)
    for path in folders:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folders


def make_smollm2(folder: Path) -> tuple[Path, Path]:
    """The embedded model in bfloat16, and a copy whose weights are moved a little."""
    import torch
    from safetensors.torch import load_file, save_file

    from midblock.models import resolve_checkpoint

    source = resolve_checkpoint("smollm2")
    tensors = {n: t.bfloat16() for n, t in load_file(source / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    folders = folder / "base", folder / "sft"
    for path, scale in zip(folders, (0.0, 1e-3), strict=True):
        path.mkdir(parents=True)
        (path / "config.json").write_text((source / "config.json").read_text())
        save_file({n: t + scale * torch.randn(t.shape, generator=generator).bfloat16() for n, t in tensors.items()},
                  path / "model.safetensors")
    return folders


def compare(name: str, base: Path, sft: Path, rounds: int) -> None:
    """Print the table of one pair."""
    files = files_of(base, sft)
    size = sum(p.stat().st_size for p in files)
    import _common as common

    rows = []
    for where, ours_is in (("disk", "weights"), ("memory", "weights"), ("memory, 1 thread", "weights1")):
        if where == "disk" and not drop_from_cache(files):
            print("disk: this system cannot drop files from its page cache")
            continue
        best: dict[str, dict[str, float]] = {}
        for _ in range(rounds):
            for what in ("read", ours_is):
                drop_from_cache(files) if where == "disk" else read_plainly(files)
                found = in_process(what, base, sft)
                if what not in best or found["seconds"] < best[what]["seconds"]:
                    best[what] = found
        plain, ours = (size / best[w]["seconds"] / 1e9 for w in ("read", ours_is))
        before, peak = best[ours_is]["before"], best[ours_is]["peak"]
        rows.append([where, f"{plain:.2f}", f"{ours:.2f}", f"{ours / plain:.0%}", f"{before:.0f}", f"{peak:.0f}",
                     f"{peak - before:.0f}"])
    common.table(f"{name}: {len(files)} files, {size / 1e9:.2f} GB", rows,
                 ["files in", "readinto GB/s", "weights GB/s", "ratio", "RSS before, MB", "RSS peak, MB", "grown, MB"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of each synthetic checkpoint")
    parser.add_argument("--dir", type=Path, help="where to put the synthetic pairs (default: the temporary folder)")
    parser.add_argument("--pair", nargs=2, type=Path, metavar=("BASE", "SFT"), help="measure this pair only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "BASE", "SFT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure[0], Path(given.measure[1]), Path(given.measure[2]))
        return
    import _common as common

    print(f"{common.machine()}; best of {given.rounds} rounds. The limit is the machine's own read of the same files.")
    if given.pair:
        compare("given pair", *given.pair, rounds=given.rounds)
        return
    with tempfile.TemporaryDirectory(prefix="midblock-weights-", dir=given.dir) as folder:
        for name, gigabytes in (("small synthetic pair", given.gigabytes / 4), ("synthetic pair", given.gigabytes)):
            compare(name, *make_pair(Path(folder) / name.replace(" ", "-"), gigabytes), rounds=given.rounds)
        compare("SmolLM2-135M", *make_smollm2(Path(folder) / "smollm2"), rounds=given.rounds)


if __name__ == "__main__":
    main()
