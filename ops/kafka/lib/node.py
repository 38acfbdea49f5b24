"""Java, and the process of a node."""

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or HERE.parent.parent / "target").resolve() / "kafka"
GET_JAVA = "On Debian and Ubuntu: apt-get install openjdk-17-jre-headless maven"
# Small and quick to start: the first compiler only, one thread for the garbage, little beside the heap.
JVM = [
    "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:MaxDirectMemorySize=64m", "-XX:ReservedCodeCacheSize=48m",
    "-Xss512k", "-Djava.awt.headless=true", "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
]


class Failure(Exception):
    """What a person is told, without a traceback."""


class Missing(Failure):
    """A program that has to be installed first."""


def java(heap="128m"):
    path = shutil.which("java") or (os.environ.get("JAVA_HOME", "") and os.environ["JAVA_HOME"] + "/bin/java")
    if not path or not os.access(path, os.X_OK):
        raise Missing(f"java is missing (version 17 or newer). {GET_JAVA}")
    return [path, f"-Xmx{heap}", *JVM]


def check_java():
    text = subprocess.run([java()[0], "-version"], capture_output=True, text=True).stderr
    version = re.search(r'version "(\d+)', text)
    if not version or int(version[1]) < 17:
        raise Missing(f"java is too old for Kafka 4 (17 or newer is needed): {text.splitlines()[:1]}. {GET_JAVA}")


def class_path(pom=HERE / "pom.xml"):
    """Maven resolves it once for each version of a pom.xml."""
    cache = TARGET / f"classpath-{hashlib.sha256(pom.read_bytes()).hexdigest()[:12]}"
    TARGET.mkdir(parents=True, exist_ok=True)
    with open(TARGET / "lock", "w") as lock:
        # Test programs start at the same time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if cache.exists() and all(os.path.exists(jar) for jar in cache.read_text().split(os.pathsep)):
            return cache.read_text()
        check_java()
        if not shutil.which("mvn"):
            raise Missing(f"maven is missing. {GET_JAVA}")
        resolve = ["mvn", "-q", "-B", "-f", str(pom), "dependency:build-classpath", f"-Dmdep.outputFile={cache}.new"]
        # First from what Maven has already, then from the network.
        for offline in (["-o"], []):
            done = subprocess.run([*resolve, *offline], capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode == 0:
                os.replace(f"{cache}.new", cache)
                return cache.read_text()
        raise Failure(f"maven cannot resolve {pom}:\n{done.stdout}{done.stderr}")


def started_at(pid):
    """When a process began, in the system's own words: a number that was given to another process is not ours."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if stat[0] == "Z" else stat[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()


class Node:
    """A node, whether it runs or not; its folder is what is known of it."""

    def __init__(self, folder, number):
        self.number = number
        self.folder = folder / f"node-{number}"
        self.log = self.folder / "server.log"

    def pid(self):
        """Its process, if it runs."""
        try:
            pid, start = (self.folder / "pid").read_text().split(" ", 1)
        except (OSError, ValueError):
            return None
        return int(pid) if started_at(pid) == start else None

    def send(self, number):
        """Sends a signal; False if it does not run."""
        pid = self.pid()
        try:
            return bool(pid) and os.kill(pid, number) is None
        except ProcessLookupError:
            return False

    def launch(self, command):
        log = open(self.log, "a")
        # A session of its own: a signal from the terminal of the one who started it does not reach it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        (self.folder / "pid").write_text(f"{process.pid} {started_at(process.pid)}")

    def wait_gone(self, seconds):
        deadline = time.monotonic() + seconds
        while self.pid():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def kill(self):
        self.send(signal.SIGKILL)
        if not self.wait_gone(20):
            raise Failure(f"node {self.number} does not die (process {self.pid()})")

    def tail(self):
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-25:]
        except OSError:
            lines = []
        return f"node {self.number}, end of {self.log}:\n" + "\n".join(f"  {line}" for line in lines)
