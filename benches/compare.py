"""blipstream beside Hugging Face transformers and candle-transformers, in turns on this machine.

    compare.py BLIPSTREAM CANDLE MODEL [--rounds 3] [--batch 1,2,4,8,16,32] [--write docs/benchmarks.md]

BLIPSTREAM is the program, CANDLE the example `candle_blip`, MODEL a folder that `peer.py --make` wrote. Each contender
runs as a process of its own, alone, every other round in reverse order; figures are medians over the rounds. The
preprocessing and the pipeline are measured once a round, the batching once; tasks and endpoint as `tasks.py` does.
"""

import argparse
import datetime
import statistics
import subprocess
import sys
from pathlib import Path

import tasks
from tasks import machine, put, run, table

HERE = Path(__file__).parent


def contenders(args):
    """Name and command of each; all print one JSON object with the same fields."""
    ours = [args.blipstream, "bench", "captioner", "--json", "--device", "cpu", "--model", args.model]
    ours += ["--batch", args.batch, "--tokens", str(args.tokens), "--time", f"{args.seconds}s"]
    peer = [sys.executable, HERE / "peer.py", args.model]
    shape = ["--batch", args.batch, "--tokens", str(args.tokens), "--seconds", str(args.seconds)]
    yield "ours bf16", [*ours, "--dtype", "bf16"]
    yield "HF bf16", [*peer, "bf16", *shape]
    yield "ours f32", [*ours, "--dtype", "f32"]
    if has_onednn(args):
        yield "ours int8", [*ours, "--dtype", "int8"]
    yield "HF f32", [*peer, "f32", *shape]
    yield "HF bf16 compiled", [*peer, "bf16", "--compile", *shape]
    yield "candle-transformers f32", [args.candle, args.model, str(args.tokens), str(args.seconds)]


def has_onednn(args):
    """Whether blipstream finds oneDNN, which int8 needs."""
    short = ["--model", "demo", "--dtype", "int8", "--batch", "1", "--tokens", "1", "--time", "1ms", "--json"]
    return subprocess.run([args.blipstream, "bench", "captioner", *short], capture_output=True).returncode == 0


def in_turns(commands, rounds):
    """Name and command of each, once a round; every other round backwards, so that nobody is always first."""
    for turn in range(rounds):
        yield from commands[:: -1 if turn % 2 else 1]


def preprocessing(args):
    """Milliseconds from the bytes of each photograph to pixels: ours, ours with large JPEGs scaled, Pillow's."""
    folder = Path(args.model).with_name("photographs")
    pillow = [sys.executable, HERE / "pillow.py"]
    made = subprocess.run([*pillow, "--make", folder], stdout=subprocess.PIPE, check=True, text=True).stdout
    files = made.splitlines()
    ours = [args.blipstream, "bench", "preprocessing", *files, "--json"]
    commands = {"ours": ours, "gap 2": [*ours, "--gap", "2"], "gap 1": [*ours, "--gap", "1"],
                "Pillow": [*pillow, "2", "384", *files]}
    runs = {name: [] for name in commands}
    for name, command in in_turns(list(commands.items()), args.rounds):
        runs[name].append(run(f"preprocessing {name}", command)["images"])
    middle = lambda name, index, field: statistics.median(one[index][field] for one in runs[name])
    rows = []
    for index, file in enumerate(files):
        all_of = {name: middle(name, index, "both") for name in commands}
        rows.append([Path(file).stem.replace("-", " "), str(round(Path(file).stat().st_size / 1000)),
                     *(number(middle(name, index, part)) for name in ("ours", "Pillow") for part in ("decode", "resize")),
                     *(number(all_of["Pillow"] / all_of[name]) for name in ("ours", "gap 2", "gap 1"))])
    return table(["photograph", "kB", "ours: decode", "resize", "Pillow: decode", "resize", "ratio", "at gap 2", "at gap 1"], rows)


def pipeline(args):
    """The whole pipeline against the captioner alone, as often as there are rounds."""
    command = [args.blipstream, "bench", "pipeline", "--json", "--model", args.model, "--time", "40s",
               "--set", "model.devices=cpu", "--set", "model.dtype=bf16", "--set", "batch.max_size=8", "--tokens", str(args.tokens)]
    runs = [run("pipeline", command) for _ in range(args.rounds)]
    rows = [[str(turn), *(number(one[f"{what}_images_per_second"]) for what in ("captioner", "pipeline")),
             number(100 * one["ratio"], 1), str(one["images"]), number(one["peak_memory"] / 1e6, 0)]
            for turn, one in enumerate(runs, 1)]
    return table(["turn", "captioner", "pipeline", "%", "images", "peak MB"], rows)


def batching(args):
    """The sizes that encoder and decoder are fed with."""
    sizes = ["--encode", "1,2,4,8", "--rows", "1,2,4,8", "--tokens", str(args.tokens), "--time", "4s"]
    found = run("batching", [args.blipstream, "bench", "batching", "--json", "--device", "cpu", "--model", args.model,
                             "--dtype", "bf16", *sizes])
    encode = table(["encoded at a time", "ms an image"], [[str(e["images"]), number(e["ms_an_image"], 0)] for e in found["encode"]])
    decode = table(["decoded at a time", "ms a step", "ms a row"],
                   [[str(d["rows"]), number(d["ms_a_step"], 1), number(d["ms_a_row"], 1)] for d in found["decode"]])
    feeding = found["feeding"]
    ratios = ", ".join(number(ratio, 3) for ratio in feeding["ratios"])
    return f"""{encode}

{decode}

Captions of {(args.tokens + 3) // 4} to {args.tokens} tokens, {feeding["rows"]} rows: {feeding["by_batches"]:.3f} images/s batch after batch,
{feeding["by_rows"]:.3f} where images are encoded as soon as rows are free and join the others; the ratio turn by turn: {ratios}."""


class Figures:
    """All runs, by contender and batch."""

    def __init__(self, runs):
        self.runs = runs

    def of(self, name, batch, field="images_per_second"):
        found = [b[field] for run in self.runs[name] for b in run["batches"] if b["batch"] == batch and field in b]
        return statistics.median(found) if found else None

    def spread(self, name, batch):
        found = [b["images_per_second"] for run in self.runs[name] for b in run["batches"] if b["batch"] == batch]
        return (min(found), max(found)) if found else None

    def batches(self, name):
        return sorted({b["batch"] for run in self.runs[name] for b in run["batches"]})

    def best(self, name):
        return max(self.of(name, batch) for batch in self.batches(name))

    def once(self, name, field):
        return statistics.median(run[field] for run in self.runs[name])


def number(value, digits=2):
    return "–" if value is None else f"{value:.{digits}f}"


def page(figures, args, others):
    batches = sorted({b for name in figures.runs for b in figures.batches(name)})
    speeds = []
    for name in figures.runs:
        cells = []
        for batch in batches:
            spread = figures.spread(name, batch)
            cells.append(f"{figures.of(name, batch):.2f} ({spread[0]:.2f}–{spread[1]:.2f})" if spread else "–")
        speeds.append([name, *cells])
    ratios = []
    for ours, theirs, goal in (("ours bf16", "HF bf16", "3"), ("ours bf16", "HF bf16 compiled", "2"), ("ours f32", "HF f32", "1.5")):
        ratio = figures.best(ours) / figures.best(theirs)
        ratios.append([f"{ours} against {theirs}, each at its best batch size", f"{ratio:.2f}", goal])
    alone = figures.of("ours bf16", 1) / figures.of("HF bf16", 1)
    ratios.append(["one image alone: ours bf16 against HF bf16", f"{alone:.2f}", "3"])
    phases = []
    for name in figures.runs:
        for batch in figures.batches(name):
            ms = lambda field: number(1e3 * value if (value := figures.of(name, batch, field)) is not None else None, 1)
            rate = figures.of(name, batch, "encode_flops")
            read = figures.of(name, batch, "step_bytes")
            phases.append([name, str(batch), ms("encode"), ms("cross_keys_values"), ms("decode"), ms("step"),
                           number(rate / 1e9 if rate else None, 0), number(read / 1e9 if read else None, 1)])
    top = lambda name: statistics.median(run["ceilings"][name] for run in figures.runs["ours f32"]) / 1e9
    rest = [[name, number(figures.once(name, "first_caption"), 1), number(figures.once(name, "peak_memory") / 1e6, 0)]
            for name in figures.runs]
    versions = figures.runs["HF f32"][0]["versions"]
    return f"""# Benchmarks on a CPU

`make bench` wrote this page on {datetime.date.today()}: {machine()}.
blipstream {figures.runs["ours f32"][0]["version"]}, {versions}. BLIP base (ViT-B/16 at 384 px, 12 + 12 layers,
vocabulary 30524) with random weights, {args.tokens} new tokens, greedy, from pixels to tokens. Rounds in which every
contender ran once, as a process of its own: {args.rounds}. A figure is the median of the rounds, with the least and the most
behind it; a dash is a batch that would have taken too long.

## Images a second, by batch size

{table(["", *map(str, batches)], speeds)}

![images a second by batch size](benchmarks.svg)

{table(["ratio", "measured", "goal"], ratios)}

## Where the time goes

Milliseconds for an image, but for the step, which is one token for all rows of the batch. The ceilings of this machine,
measured in the same runs: {top("multiply_adds"):.0f} GFLOP/s in registers, {top("product"):.0f} of a large product of ours in f32,
{top("memory"):.1f} GB/s from memory.

{table(["", "batch", "encode", "keys, values", "decode", "step", "encoder GFLOP/s", "weights GB/s"], phases)}

## Start and memory

From the start of loading to the first caption; Python's imports, some seconds more, are not counted.

{table(["", "s to the first caption", "peak MB"], rest)}

## Preprocessing

One thread, from a JPEG to 384×384 pixels, in milliseconds; the ratio is Pillow's time over ours. "detailed" has the
spectrum and quality (85) of published photographs, "smooth" little detail and quality 75. The last two columns are with
`decode.jpeg_reducing_gap` of 2 and 1, which decodes large JPEGs at a part of their size; Pillow decodes them whole, and
reads its file and converts to RGB while it does.

{others["preprocessing"]}

## The whole pipeline

Consume, fetch, decode, caption, publish in one process with the embedded broker and the server of the images (640×427
JPEGs), bf16, against the same captioner alone on pixels that are there. Images a second; memory is that of the process.

{others["pipeline"]}

## Batches

bf16, without the rest of the pipeline (`blipstream bench batching`).

{others["batching"]}
"""


def plot(figures, file):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "blipstream"
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in figures.runs:
        batches = figures.batches(name)
        style = "-" if name.startswith("ours") else "--"
        axes.plot(batches, [figures.of(name, batch) for batch in batches], style, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images captioned together")
    axes.set_ylabel("images a second")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser()
    for name in ("blipstream", "candle", "model"):
        parser.add_argument(name)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", default="1,2,4,8,16,32")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--write", type=Path, help="the page; the plot goes beside it")
    args = parser.parse_args()
    runs = {name: [] for name, _ in contenders(args)}
    for name, command in in_turns(list(contenders(args)), args.rounds):
        runs[name].append(run(name, command))
    figures = Figures(runs)
    others = {part.__name__: part(args) for part in (preprocessing, pipeline, batching)}
    text = page(figures, args, others)
    for section in (tasks.tasks, tasks.endpoint):
        text = put(text, section(args.blipstream))
    print(text)
    if args.write:
        args.write.write_text(text)
        plot(figures, args.write.with_suffix(".svg"))


if __name__ == "__main__":
    main()
