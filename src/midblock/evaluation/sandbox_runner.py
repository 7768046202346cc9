"""The process that `midblock.evaluation.sandbox` starts; it imports nothing but the standard library.

Started as ``python -I -S -B sandbox_runner.py REPORT_FD SECONDS MEMORY_MB FOLDER`` with a secret
word and the program on standard input. It shuts itself off, forks, runs the program in the
child and reports in lines on REPORT_FD: ``isolation ...``, then ``passed WORD``, ``failed ...``,
``timeout`` or nothing.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
import time

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV = 0x4000, 0x40000, 0x2, 0x4
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 0x1
_PR_SET_PDEATHSIG = 1


class _MountAttributes(ctypes.Structure):
    _fields_ = (("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
                ("userns", ctypes.c_uint64))


def isolate(folder: str) -> list[str]:
    """Leave the network, the other processes and the writable files behind, as far as the kernel lets us.

    Returns:
        Which of ``network``, ``processes`` and ``files`` it let us.
    """
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEWUSER | _NEWNET | _NEWPID | _NEWNS | _NEWIPC) != 0:
        return []
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as stream:
                stream.write(text)
    except OSError:
        return ["network", "processes"]
    attributes = _MountAttributes(_ATTR_RDONLY, 0, 0, 0)
    read_only = (
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
        and libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, ctypes.byref(attributes),
                         ctypes.sizeof(attributes)) == 0
        and libc.mount(b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=64m") == 0)
    os.chdir("/")
    os.chdir(folder)
    return ["network", "processes", *(["files"] if read_only else [])]


def limit(seconds: float, memory_mb: int) -> None:
    """Limits of this process and of every one that it starts."""
    whole = math.ceil(seconds)
    size = memory_mb << 20
    for what, value in ((resource.RLIMIT_CPU, whole), (resource.RLIMIT_AS, size),
                        (resource.RLIMIT_DATA, size), (resource.RLIMIT_FSIZE, 16 << 20),
                        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def run(program: str, report: int, token: str) -> None:
    """Run the program as ``__main__`` and report how it ended."""
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        os.write(report, f"failed {text}\n".encode("utf-8", "replace"))
    else:
        os.write(report, f"passed {token}\n".encode())


def main() -> None:
    """Isolate, limit, fork, wait, report."""
    report, seconds, memory_mb, folder = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    token, _, program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").partition("\n")
    words = isolate(folder)
    os.write(report, f"isolation {' '.join(words)}\n".encode())
    # the child is process 1 of its own world: when it dies, the kernel kills all that it started
    child = os.fork()
    if child == 0:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        limit(seconds, memory_mb)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        run(program, report, token)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
                late = os.WTERMSIG(status) == signal.SIGXCPU
                os.write(report, b"timeout\n" if late else b"failed killed\n")
            return
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.write(report, b"timeout\n")


if __name__ == "__main__":
    main()
