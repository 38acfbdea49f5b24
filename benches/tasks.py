"""What beams, the filter and the endpoint cost beside plain captions: two sections of the page of benchmarks.

    tasks.py BLIPSTREAM [--write docs/benchmarks.md]

The sections are put in the place of those that the page has, or at its end.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

NAMES = {
    "greedy": "caption, greedy",
    "beams": "caption, 3 beams",
    "judge": "one text judged, no caption",
    "filter_twice": "caption and filter, the image encoded twice",
    "filter_once": "caption and filter, the image encoded once",
    "candidates": "three candidates and filter, the image encoded once",
}
TURNS, TOKENS = 3, 20
# Model, clients, seconds.
BESIDE = (("demo", 1, 40), ("demo", 8, 40), ("demo", 32, 40), ("random-base", 4, 240))


def run(name, command):
    print(f"{datetime.datetime.now():%H:%M:%S} {name}", file=sys.stderr, flush=True)
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine():
    flags = cpu = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        cpu = cpu or (value.strip() if key.startswith("model name") else "")
        flags = flags or (value if key.startswith("flags") else "")
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    return f"{cpu}, {len(os.sched_getaffinity(0))} hardware threads, {' '.join(f for f in known if f in flags.split())}; {platform.system()}"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def tasks(blipstream):
    """Beams and the filter against greedy captions, and what is shared."""
    command = [blipstream, "bench", "tasks", "--json", "--device", "cpu", "--dtype", "bf16", "--model", "random-base"]
    found = run("tasks", [*command, "--batch", "1,8", "--turns", str(TURNS), "--tokens", str(TOKENS)])
    rows, shared = [], []
    for batch in found["batches"]:
        size = batch["batch"]
        for one in batch["tasks"]:
            ratios = one["against_greedy"]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            rows.append([NAMES[one["task"]], str(size), f"{one['ms_an_image']:.0f}", spread])
        shared.append(f"{100 * batch['shared_work']:.0f} % with {size} at a time")
    return f"""## Tasks

{datetime.date.today()}, blipstream {found["version"]}, {machine()}. BLIP base with random weights as captioner and as filter,
bf16, {TOKENS} tokens a caption, one found text of 13 words an image (`blipstream bench tasks`). The ratio is that of images a
second to greedy captions, the median of {TURNS} turns with the least and the most behind it.

{table(["", "at a time", "ms an image", "against greedy"], rows)}

Where captioner and filter have the same image encoder, that much of the work of caption and filter is done once instead of
twice: {" and ".join(shared)}. Where the encoders differ, nothing is shared."""


def endpoint(blipstream):
    """The endpoint beside a stream that always has work."""
    rows = []
    for model, clients, seconds in BESIDE:
        command = [blipstream, "bench", "pipeline", "--json", "--model", model, "--tokens", str(TOKENS), "--time", f"{seconds}s"]
        command += ["--clients", str(clients), "--set", "model.devices=cpu", "--set", "model.dtype=bf16", "--set", "batch.max_size=8"]
        found = run(f"endpoint {model} {clients}", command)
        beside = found["endpoint"]
        rows.append([model, str(clients), f"{found['pipeline_images_per_second']:.2f}", f"{beside['images_per_second']:.2f}",
                     f"{100 * beside['share']:.0f}", str(beside["images"]),
                     *(f"{beside[f'{which}_ms']:.0f}" for which in ("p50", "p99", "most"))])
    share = 100 * beside["configured_share"]
    head = ["model", "clients", "stream images/s", "/score images/s", "share %", "answers", "p50 ms", "p99 ms", "most ms"]
    return f"""## The endpoint beside a stream

{datetime.date.today()}, blipstream {found["version"]}, {machine()}. One worker with a backlog in Kafka (the embedded broker) that
does not end, and clients of `POST /score` that ask for one 640×427 JPEG after another (`blipstream bench pipeline --clients`),
bf16, batches of 8, `endpoint.share` at {share:.0f} %. A client has one image under way, so few clients cannot use up the share; what they
leave is the stream's. `demo` is the small bundled model, `random-base` BLIP base.

{table(head, rows)}"""


def put(page, section):
    """The page with the section in the place of that of the same heading, or at the end."""
    heading = section.splitlines()[0]
    old = re.compile(rf"^{re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    new = f"{section}\n\n"
    page = old.sub(lambda _: new, page) if old.search(page) else f"{page.rstrip()}\n\n{new}"
    return page.rstrip() + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("blipstream")
    parser.add_argument("--write", type=Path, help="the page that has the sections")
    args = parser.parse_args()
    sections = [part(args.blipstream) for part in (tasks, endpoint)]
    print("\n\n".join(sections))
    if args.write:
        page = args.write.read_text()
        for section in sections:
            page = put(page, section)
        args.write.write_text(page)


if __name__ == "__main__":
    main()
