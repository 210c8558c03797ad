"""What a run leaves behind on this machine: processes, sockets, descriptors, shared memory."""

import os
import re
import subprocess
import time
from pathlib import Path

MARK = "STEP3_HETERO_LEAK_CHECK"
"""A variable that children inherit, so that an orphan is known whoever its parent is now."""

KINDS = ("socket:", "pipe:", "anon_inode:[eventfd]", "anon_inode:[pidfd]", "/memfd:")


def marked(value):
    """Return the ids of processes that were started with the mark, ours left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                is_zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if f"{MARK}={value}".encode() in environment and not is_zombie:
                found.append(int(entry.name))
    return found


def children():
    """Return the ids of our child processes, zombies too."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found |= {int(pid) for pid in (task / "children").read_text().split()}
        except OSError:
            continue
    return found


def descriptors():
    """Count our own descriptors that a link, a process or shared memory takes, by kind."""
    counts = dict.fromkeys(KINDS, 0)
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        for kind in KINDS:
            counts[kind] += target.startswith(kind)
    return counts


def owners(inode):
    """Return the processes that hold a socket."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(entry.readlink()) == f"socket:[{inode}]":
                found.append(int(entry.parts[2]))
        except OSError:
            continue
    return found


def unix_sockets():
    """Return the inode of each socket with one of our names, by the name."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {x[7]: x[6] for x in lines if len(x) > 7 and x[7].startswith("@step3-hetero")}


def tcp_listeners():
    """Return (address, process) of everybody who listens."""
    told = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=False).stdout
    return {
        (line.split()[3], int(pid))
        for line in told.splitlines()
        for pid in re.findall(r"pid=(\d+)", line)
    }


def shared_memory():
    """Return the files of /dev/shm."""
    return {p.name for p in Path("/dev/shm").iterdir()}


class Before:
    """How things stood; ``left`` says what is there now and was not then."""

    def __init__(self, mark):
        self.mark = mark
        self.children = children()
        self.descriptors = descriptors()
        self.unix = set(unix_sockets())
        self.tcp = tcp_listeners()
        self.memory = shared_memory()

    def left(self):
        found, ours = [], {os.getpid(), *marked(self.mark)}
        found += [f"process {pid}" for pid in marked(self.mark)]
        found += [f"child {pid}" for pid in children() - self.children]
        for name, inode in unix_sockets().items():
            holders = owners(inode) if name not in self.unix else None
            if holders is not None and (not holders or ours & set(holders)):
                found.append(f"socket {name}")
        found += [f"listener at {a}" for a, pid in tcp_listeners() - self.tcp if pid in ours]
        found += [f"/dev/shm/{n}" for n in shared_memory() - self.memory if "step3" in n]
        now = descriptors()
        found += [f"{now[k] - n} more of {k}" for k, n in self.descriptors.items() if now[k] > n]
        return found

    def wait(self, deadline_s=20.0):
        """Return what is left once nothing is, or the deadline has passed."""
        until = time.monotonic() + deadline_s
        while (found := self.left()) and time.monotonic() < until:
            time.sleep(0.2)
        return found
