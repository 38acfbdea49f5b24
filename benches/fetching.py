"""Fetching and decoding: blipstream beside img2dataset, in turns, on this machine, from one server of pictures on it.

    fetching.py BLIPSTREAM SERVER [--rounds 3] [--pictures 1000] [--write docs/benchmarks-fetching.md]

BLIPSTREAM is the program. SERVER FOLDER prints its address, such as http://127.0.0.1:8000, and serves /NAME from memory
until its input ends. A contender runs as a process of its own, alone with the server, every other round in reverse order.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from compare import in_turns, machine, number, table

WORK = Path(__file__).parent.parent / "target" / "bench" / "fetching"
# Pictures of the second size can be decoded at half of it and still fill the model's square.
SIZES, SIDE = ((900, 600), (1024, 768)), 384
QUALITY, LEAST, MOST = 85, 100_000, 108_000
PROCESSES = 2
# A worker of img2dataset is replaced, and imports everything again, after five shards.
SHARDS = 2 * PROCESSES
THREADS = (8, 16, 32, 64)
# There is no mode that stretches. "border" is the default and the cheapest that ends in 384×384. Without resizing and
# re-encoding, img2dataset decodes a JPEG and throws the pixels away.
IMG2DATASET = {
    "img2dataset": {"resize_mode": "border", "image_size": SIDE, "resize_only_if_bigger": False},
    "img2dataset, decoding only": {"resize_mode": "no", "skip_reencode": True},
}
BLIPSTREAM = {"blipstream": "full", "blipstream, scaled": "scaled"}


@dataclass
class Run:
    """What one run of a contender took, start-up and all (`whole`) and without; CPU in seconds of all cores."""

    images: int
    seconds: float
    cpu: float
    whole_seconds: float
    whole_cpu: float
    server_cpu: float

    def of(self, figure):
        return self.images / self.seconds if figure == "speed" else 1e3 * getattr(self, figure) / self.images


def photograph(seed, detail, size):
    """A JPEG like a photograph: a gradient, shapes with sharp edges, and detail that falls off with its fineness, as
    strong as makes the file 100 to 108 kB large."""
    import numpy as np
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    width, height = size
    down, right = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    tilt = random.uniform(-40, 40, (2, 3))
    light = 120 + right[..., None] * tilt[0] + down[..., None] * tilt[1]
    picture = Image.fromarray(light.clip(0, 255).astype("uint8"))
    draw = ImageDraw.Draw(picture)
    for _ in range(random.integers(4, 10)):
        left, top = random.integers(-100, width), random.integers(-100, height)
        box = [left, top, left + random.integers(40, 400), top + random.integers(40, 300)]
        shape = random.choice([draw.ellipse, draw.rectangle])
        shape(box, fill=tuple(random.integers(30, 220, 3)))
    plain = np.asarray(picture, np.float32)
    side = detail.shape[0]

    def layer():
        x, y = random.integers(side - width), random.integers(side - height)
        return detail[y:y + height, x:x + width]

    shared = layer()
    texture = np.stack([shared + layer() / 3 for _ in range(3)], -1)
    weak, strong = 0.0, 80.0
    while True:
        strength = (weak + strong) / 2
        file = io.BytesIO()
        pixels = (plain + texture * strength).clip(0, 255).astype("uint8")
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0", progressive=False)
        if LEAST <= file.tell() <= MOST:
            return file.getvalue()
        weak, strong = (strength, strong) if file.tell() < LEAST else (weak, strength)


def pictures(size, count):
    """The names of the pictures; those not there are made, each from its own seed."""
    folder = WORK / "x".join(map(str, size))
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{seed:05}.jpg" for seed in range(count)]
    missing = [file for file in files if not file.exists()]
    if missing:
        import numpy as np

        say(f"making {len(missing)} pictures")
        side = 2048
        fineness = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
        fineness[0, 0] = np.inf
        detail = np.fft.irfft2(np.fft.rfft2(np.random.default_rng(2**32).normal(size=(side, side))) / fineness**1.2)
        detail = (detail / detail.std()).astype(np.float32)
        for file in missing:
            half = file.with_suffix(".half")
            half.write_bytes(photograph(int(file.stem), detail, size))
            half.rename(file)
    return files


def say(text):
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


class Server:
    """The server of the pictures, while the block lasts."""

    def __init__(self, binary, folder):
        self.process = subprocess.Popen([binary, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        self.address = self.process.stdout.readline().strip()
        if not self.address.startswith("http://"):
            self.__exit__()
            sys.exit(f"The server of the pictures printed {self.address!r} in place of its address.")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def cpu(self):
        """Seconds of CPU so far, of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def watched(name, command, server, **popen):
    """Runs a command; its output, and what it and the children it waited for took: wall and CPU, and the server's CPU."""
    say(name)
    before, began = server.cpu(), time.perf_counter()
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, **popen)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    took = time.perf_counter() - began, usage.ru_utime + usage.ru_stime, server.cpu() - before
    if child.returncode:
        sys.exit(f"{output[-3000:]}\n{name} failed with {child.returncode}.")
    return output, *took


def demand(name, what, found, wanted, output=""):
    """A contender that skips pictures would look fast."""
    if found != wanted:
        sys.exit(f"{output[-3000:]}\n{name}: {what}: {found} in place of {wanted}, so nothing is reported.")


def ours(name, args, urls, server):
    command = [args.blipstream, "bench", "fetching", "--list", urls, "--decode", BLIPSTREAM[name]]
    output, seconds, cpu, server_cpu = watched(name, command, server)
    found = json.loads(output.splitlines()[-1])
    demand(name, "pictures decoded", found["images"], args.pictures)
    demand(name, "pictures failed", found["failed"], 0)
    demand(name, "bytes fetched", found["bytes"], args.bytes)
    return Run(args.pictures, found["seconds"], cpu, seconds, cpu, server_cpu)


def theirs(name, args, urls, server, threads):
    # Its incremental_mode "overwrite" deletes a folder that it has just made for itself, and fails.
    folder = WORK / "img2dataset"
    shutil.rmtree(folder, ignore_errors=True)
    options = {
        **IMG2DATASET[name], "url_list": str(urls), "output_folder": str(folder), "thread_count": threads,
        "processes_count": PROCESSES, "number_sample_per_shard": -(-args.pictures // SHARDS), "output_format": "dummy",
        "extract_exif": False, "compute_hash": None, "disallowed_header_directives": [],
    }
    command = [sys.executable, __file__, "--img2dataset", json.dumps(options)]
    # Else albumentations, which it resizes with, asks PyPI for a newer version whenever it is imported.
    quiet = {"stderr": subprocess.STDOUT, "env": {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}}
    output, seconds, cpu, server_cpu = watched(f"{name}, {threads} threads", command, server, **quiet)
    shards = [json.loads(file.read_text()) for file in folder.glob("*_stats.json")]
    demand(name, "pictures decoded", sum(shard["successes"] for shard in shards), args.pictures, output)
    # As it reckons its own speed: from the start of the first shard, when its modules are imported, to the end of the last.
    working = max(shard["end_time"] for shard in shards) - min(shard["start_time"] for shard in shards)
    working_cpu = sum(float(file.read_text()) for file in folder.glob("*.cpu"))
    return Run(args.pictures, working, working_cpu, seconds, cpu, server_cpu)


class Timed:
    """img2dataset's downloader, which a worker calls with one shard after the other; writes down the CPU of each."""

    def __init__(self, **options):
        from img2dataset.downloader import Downloader

        self.folder, self.downloader = Path(options["output_folder"]), Downloader(**options)

    def __call__(self, shard):
        before = time.process_time()
        done = self.downloader(shard)
        (self.folder / f"{shard[0]}.cpu").write_text(str(time.process_time() - before))
        return done


def img2dataset(options):
    # `img2dataset.main` is a function of the package that hides the module.
    program = importlib.import_module("img2dataset.main")
    program.Downloader = Timed
    program.download(**options)


def spread(values, digits):
    return f"{number(statistics.median(values), digits)} ({number(min(values), digits)}–{number(max(values), digits)})"


def figures(size, runs, tried, args):
    of = lambda name, figure: [run.of(figure) for run in runs[name]]
    rows = [[name, spread(of(name, "speed"), 0), spread(of(name, "cpu"), 2), spread(of(name, "server_cpu"), 2),
             *(number(statistics.median(getattr(run, f"whole_{what}") for run in runs[name]), 1) for what in ("seconds", "cpu"))]
            for name in runs]
    by_round = lambda figure, up, down: [a / b for a, b in zip(of(up, figure), of(down, figure))]
    ratios = [[f"{us} against {them}", spread(by_round("speed", us, them), 2), spread(by_round("cpu", them, us), 2)]
              for us in BLIPSTREAM for them in IMG2DATASET]
    threads = table(["threads a process", *map(str, THREADS)],
                    [[name, *(number(speed, 0) for speed in speeds.values())] for name, speeds in tried.items()])
    return f"""## Pictures of {size[0]}×{size[1]}

{table(["", "images/s", "CPU ms an image", "server's CPU ms an image", "whole run, s", "whole run, CPU s"], rows)}

{table(["ratio, round by round", "images/s: ours / theirs", "CPU: theirs / ours"], ratios)}

Before the rounds img2dataset ran once with each of these numbers of threads (its default is 256). The rounds are with the
fastest. Images a second:

{threads}

"""


def page(sections, mean, args):
    version = subprocess.run([args.blipstream, "--version"], capture_output=True, check=True, text=True).stdout.strip()
    packages = ", ".join(f"{package} {importlib.metadata.version(package)}"
                         for package in ("img2dataset", "opencv-python-headless", "albumentations", "pillow"))
    return f"""# Fetching and decoding beside img2dataset

`make fetching` wrote this page on {datetime.date.today()}: {machine()}.
{version}; {packages}, Python {platform.python_version()}.
Rounds in which every contender ran once, as a process of its own, alone with the server: {args.rounds}. A figure is the median
of the rounds, with the least and the most behind it.

Images a second are from the first request to the last decoded picture, and of img2dataset from the start of its first
shard to the end of its last, as it reckons itself. CPU is user and system time of all cores: img2dataset's is that of its
workers while they have shards; ours is that of the process from its start to its end. The last two columns count the
start too, Python's imports among it.

{"".join(sections)}## The pictures

Of each size {args.pictures} different JPEGs of {LEAST // 1000} to {MOST // 1000} kB ({number(mean / 1e3, 1)} on average), baseline, 4:2:0, quality {QUALITY},
made from fixed seeds: a gradient, shapes with sharp edges, and noise whose strength falls off with its fineness as in
photographs, as strong as that size of file needs. One server on the same machine and the same cores sends them from memory,
and keeps connections open for those who ask for that. Every picture must arrive and be decoded by every contender, or
nothing is reported.

## What each does to a picture

- blipstream decodes it and stretches it to {SIDE}×{SIDE} with the bicubic filter, as the model's processor does, and keeps the
  pixels. "Scaled" decodes a JPEG at a part of its size where that fills the square (`decode.jpeg_reducing_gap = 1`): at half
  of 1024×768, and not at all of 900×600.
- img2dataset, with {PROCESSES} processes, decodes it, shrinks it to {SIDE} pixels on its longer side with the area filter, pads it with
  white to {SIDE}×{SIDE} (`border`, its default: it has no mode that stretches), and encodes it as a JPEG of quality 95, which
  is not written to disk (`output_format=dummy`). No hashes, no EXIF.
- img2dataset, decoding only (`resize_mode=no`, `skip_reencode`), does the least that it can and still decode: it neither
  resizes nor encodes. That is less than ours does.

## What is not alike

- img2dataset makes data sets, so it encodes; blipstream feeds a model, so it does not. The row that only decodes shows what
  resizing and encoding cost.
- img2dataset opens a connection for each picture, which costs the server more too; blipstream keeps connections.
- The server takes its share of the same cores, so images a second are of contender and server together.
- The pictures are on this machine: no time is lost on a network, and nothing fails. On the web it is the waiting that counts.
"""


def compared(size, files, args):
    with Server(args.server, files[0].parent) as server:
        urls = WORK / "urls.txt"
        urls.write_text("".join(f"{server.address}/{file.name}\n" for file in files))
        tried = {name: {count: theirs(name, args, urls, server, count).of("speed") for count in THREADS} for name in IMG2DATASET}
        best = {name: max(speeds, key=speeds.get) for name, speeds in tried.items()}
        commands = [(name, lambda name=name: ours(name, args, urls, server)) for name in BLIPSTREAM]
        commands += [(name, lambda name=name: theirs(name, args, urls, server, best[name])) for name in IMG2DATASET]
        runs = {name: [] for name, _ in commands}
        for name, measure in in_turns(commands, args.rounds):
            runs[name].append(measure())
    return figures(size, runs, tried, args)


def main():
    if sys.argv[1:2] == ["--img2dataset"]:
        return img2dataset(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser()
    parser.add_argument("blipstream", type=Path)
    parser.add_argument("server", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--write", type=Path, help="the page")
    args = parser.parse_args()
    sections, means = [], []
    for size in SIZES:
        say(f"pictures of {size[0]}×{size[1]}")
        files = pictures(size, args.pictures)
        args.bytes = sum(file.stat().st_size for file in files)
        means.append(args.bytes / args.pictures)
        sections.append(compared(size, files, args))
    text = page(sections, statistics.mean(means), args)
    print(text)
    if args.write:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
