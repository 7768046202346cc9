"""The processes that `midblock.evaluation.sandbox` starts; nothing but the standard library is imported.

Started as ``python -I -S -B sandbox_runner.py REPORT_FD SECONDS MEMORY_MB FOLDER REQUIRED`` with two
parts on standard input, each after its length (8 bytes): the program, and the test of it as JSON.

Four processes, each trusted less than the one before:

* the *runner* leaves the network, the other processes and the file system behind (`isolate`);
* *init* is process 1 of that world: it starts the next two and ends both at the deadline (`supervise`);
* the *judge* runs the test and alone holds REPORT_FD (`judge`);
* the *candidate* runs the program and answers the judge's calls with plain data (`serve`). It starts before the
  test is read, so that neither the test nor any way to report success is in its memory or among its files.

Lines on REPORT_FD: ``isolation WORDS``, then ``passed``, ``failed ...`` or ``timeout``.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_HOME = "/sandbox"  # the only place that can be written, a file system of its own
_HOME_SIZE, _THREADS, _REPLY = "size=64m,nr_inodes=4096,mode=777", 32, 1 << 25
_NOBODY = 65534
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/etc/ld.so.cache", "/dev/null", "/dev/zero",
              "/dev/urandom")

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x2, 0x4, 0x1000, 0x4000, 0x40000, 0x2
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 442, -100, 0x8000, 0x1, 0x2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PDEATHSIG, _SECCOMP, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS, _AMBIENT = 1, 22, 24, 36, 38, 47

# System calls that a computation needs, with their numbers on x86_64 and aarch64; all others are refused. Missing
# on purpose: whatever starts a process or a program, mounts, makes a name space or a socket, traces, or keeps
# memory that no limit of the process counts (shared segments, memory files).
CALLS = """
read 0 63, write 1 64, close 3 57, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62,
open 2 -, openat 257 56, creat 85 -, close_range 436 436, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79,
statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439, getdents64 217 61,
getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34,
rmdir 84 -, unlink 87 -, unlinkat 263 35, symlink 88 -, symlinkat 266 36, link 86 -, linkat 265 37, readlink 89 -,
readlinkat 267 78, chmod 90 -, fchmod 91 52, fchmodat 268 53, umask 95 166, utimensat 280 88, truncate 76 45,
ftruncate 77 46, fallocate 285 47, fadvise64 221 223, fsync 74 82, fdatasync 75 83, flock 73 32, fcntl 72 25,
ioctl 16 29, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, sendfile 40 71, copy_file_range 326 285,
select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
epoll_pwait 281 22, eventfd2 290 19, sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210,
getsockname 51 204, getsockopt 55 209, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216,
msync 26 227, mincore 27 232, madvise 28 233, membarrier 324 283, futex 202 98, rseq 334 293,
set_tid_address 218 96, set_robust_list 273 99, get_robust_list 274 100, sched_yield 24 124,
sched_getaffinity 204 123, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132,
restart_syscall 219 128, pause 34 -, alarm 37 -, getitimer 36 102, setitimer 38 103, nanosleep 35 101,
clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153,
getrandom 318 278, uname 63 160, sysinfo 99 179, getrusage 98 165, getrlimit 97 163, getpid 39 172, getppid 110 173,
gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getpgrp 111 -,
getpgid 121 155, getsid 124 156, arch_prctl 158 -, wait4 61 260, exit 60 93, exit_group 231 94
"""
# allowed for a value of the first argument only: threads, signals to oneself, one's own limits, local socket pairs
_CLONE, _KILL, _TGKILL, _PRLIMIT, _SOCKETPAIR = (56, 220), (62, 129), (234, 131), (302, 261), (53, 199)
_CLONE3, _CLONE_THREAD, _AF_UNIX = 435, 0x10000, 1
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


class _MountAttributes(ctypes.Structure):
    _fields_ = (("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
                ("userns", ctypes.c_uint64))


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# ---------------------------------------------------------------- name spaces and files


def isolate(folder: str) -> list[str]:
    """Leave the network, the other processes and the files behind, as far as the kernel lets us.

    Afterwards the root is a file system in memory with the interpreter's library, the system's shared libraries and
    three devices, all read-only, and an empty folder of 64 MiB, which is the working folder.

    Returns:
        Which of ``network``, ``processes`` and ``files`` it let us.
    """
    if sys.platform != "linux":
        return []
    libc = _libc()
    with _map_users_from_outside() as left:
        if libc.unshare(_NEWUSER | _NEWNET | _NEWPID | _NEWNS | _NEWIPC | _NEWUTS) != 0:
            return []
        left()
    found = ["network", "processes"]
    try:
        _map_users()
        _new_root(libc, folder)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    except OSError:
        return found
    return [*found, "files"]


@contextlib.contextmanager
def _map_users_from_outside() -> Iterator[Callable[[], None]]:
    """Within the context a process waits outside; once told, it maps root of the new world to nobody's id.

    Only the real root can; limits on the number of processes do not hold for the real root's own id.
    """
    if os.getuid() != 0:
        yield lambda: None
        return
    me = os.getpid()
    ready, tell = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(tell)
        with contextlib.suppress(OSError):
            if os.read(ready, 1):
                for name in ("gid_map", "uid_map"):
                    _write(f"/proc/{me}/{name}", f"0 {_NOBODY} 1\n1 0 1\n")
        os._exit(0)
    os.close(ready)

    def left() -> None:
        os.write(tell, b"1")
        os.waitpid(helper, 0)

    try:
        yield left
    finally:
        os.close(tell)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(helper, 0)


def _map_users() -> None:
    """Map root of the new world to our own id, unless root outside has mapped it already."""
    with open("/proc/self/uid_map") as stream:
        if stream.read().strip():
            return
    user, group = _outside
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        _write(f"/proc/self/{name}", text)


_outside = (os.getuid(), os.getgid())


def _write(path: str, text: str) -> None:
    with open(path, "w") as stream:
        stream.write(text)


def _new_root(libc: Any, root: str) -> None:
    def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
        _check(libc.mount(source.encode(), target.encode(), None if kind is None else kind.encode(), flags,
                          None if options is None else options.encode()))

    mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    wanted = sorted({*_LIBRARIES, os.path.join(sys.base_prefix, "lib"), *filter(os.path.isdir, sys.path)})
    for path in wanted:
        target = root + path
        if not os.path.exists(path) or os.path.lexists(target):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):  # /lib is a link into /usr on most systems
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT, 0o444))
        mount(path, target, None, _MS_BIND | _MS_REC)
    os.mkdir(root + _HOME)
    attributes = _MountAttributes(_ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
    _check(libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, root.encode(), _AT_RECURSIVE, ctypes.byref(attributes),
                        ctypes.sizeof(attributes)))
    mount("tmpfs", root + _HOME, "tmpfs", _MS_NOSUID | _MS_NODEV, _HOME_SIZE)
    os.chdir(root)
    _check(libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."))
    _check(libc.umount2(b".", _MNT_DETACH))
    os.chdir(_HOME)
    os.environ.update(HOME=_HOME, TMPDIR=_HOME)


# ---------------------------------------------------------------- privileges, calls, limits


def give_up_privileges() -> None:
    """Give up every capability, for this process and all that it could ever become."""
    if sys.platform != "linux":
        return
    libc = _libc()
    for capability in range(64):
        if libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0) != 0 and ctypes.get_errno() == errno.EINVAL:
            break
    libc.prctl(_AMBIENT, 4, 0, 0, 0)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    libc.capset(header, none)
    _check(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))


def can_filter() -> bool:
    """Whether this kernel filters system calls and we know the numbers of this machine's."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES or sys.maxsize < 1 << 32:
        return False
    # an address that cannot be read: a kernel that knows filters says EFAULT
    return bool(_libc().prctl(_SECCOMP, 2, None, 0, 0) == -1 and ctypes.get_errno() == errno.EFAULT)


def filter_calls() -> None:
    """Refuse every system call but those of `CALLS`, for good; needs `give_up_privileges` first."""
    column, architecture = _MACHINES[platform.machine()]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050000 | errno.EPERM)
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, 0x80000000), (load, 0, 0, 0),
            (at_least, 0, 1, 0x40000000), refuse,
            (equal, 0, 1, _CLONE3), (answer, 0, 0, 0x00050000 | errno.ENOSYS)]
    for calls, test, value in ((_CLONE, any_bit, _CLONE_THREAD), (_KILL, equal, os.getpid()),
                               (_TGKILL, equal, os.getpid()), (_PRLIMIT, equal, 0), (_SOCKETPAIR, equal, _AF_UNIX)):
        code += [(equal, 0, 4, calls[column]), (load, 0, 0, 16), (test, 0, 1, value), allow, refuse]
    for call in CALLS.split(","):
        number = call.split()[1 + column]
        if number != "-":
            code += [(equal, 0, 1, int(number)), allow]
    code.append(refuse)
    text = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    _check(_libc().prctl(_SECCOMP, 2, ctypes.byref(_Filter(len(code), text)), 0, 0))


def limit(seconds: float, memory_mb: int) -> None:
    """Limits of this process; it starts no other (where calls are filtered), so they are those of the whole tree."""
    size = memory_mb << 20
    wanted = [(resource.RLIMIT_CPU, math.ceil(seconds)), (resource.RLIMIT_AS, size), (resource.RLIMIT_DATA, size),
              (resource.RLIMIT_FSIZE, 16 << 20), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)]
    if _isolated("processes"):  # elsewhere the number counts all processes of the user
        wanted.append((resource.RLIMIT_NPROC, _THREADS))
    for what, value in wanted:
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


_words: list[str] = []


def _isolated(word: str) -> bool:
    return word in _words


# ---------------------------------------------------------------- plain data between judge and candidate


class Opaque:
    """Stands for a value that is no plain data; equal to nothing."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}: not plain data>"


_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def pack(value: Any) -> Any:
    """A value as JSON: its plain type and content, whatever its class says about itself."""
    if value is None or type(value) is bool:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["int", int.__format__(value, "x")]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [name, [pack(v) for v in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[pack(k), pack(v)] for k, v in dict.items(value)]]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    return ["opaque", type(value).__name__]


def unpack(value: Any) -> Any:
    """The value that `pack` was given; classes become the plain types that they extend."""
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "int":
        return int(rest[0], 16)
    if kind == "float":
        return float.fromhex(rest[0])
    if kind == "complex":
        return complex(float.fromhex(rest[0]), float.fromhex(rest[1]))
    if kind == "bytes":
        return bytes.fromhex(rest[0])
    if kind == "dict":
        return {unpack(k): unpack(v) for k, v in rest[0]}
    if kind == "range":
        return range(*map(int, rest))
    if kind == "opaque":
        return Opaque(str(rest[0]))
    return _SEQUENCES[kind](map(unpack, rest[0]))


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# ---------------------------------------------------------------- candidate and judge


def serve(program: str, calls: int, answers: int) -> None:
    """Run the program, then answer calls of its functions until the judge is gone."""
    asked, told = os.fdopen(calls, "rb"), os.fdopen(answers, "wb")

    def tell(*answer: Any) -> None:
        told.write(json.dumps(answer).encode() + b"\n")
        told.flush()

    space: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(program, "program.py", "exec"), space)
    except BaseException as error:
        tell("error", type(error).__name__, _told(error))
        return
    tell("ready", None)
    for line in asked:
        name, args, kwargs = json.loads(line)
        try:
            found = space[name](*unpack(args), **unpack(kwargs))
            tell("value", pack(found))
        except BaseException as error:
            tell("error", type(error).__name__, _told(error))


class CandidateError(Exception):
    """The program raised an error of a kind that is not built in."""


def _raised(kind: str, told: str) -> BaseException:
    """The error that the program raised, of its kind where that is built in."""
    known = getattr(builtins, kind, None)
    known = known if isinstance(known, type) and issubclass(known, Exception) else CandidateError
    error: BaseException = known.__new__(known)
    error.args, error.__dict__["told"] = (told,), told
    return error


class _CandidateGoneError(BaseException):
    pass


def judge(test: dict[str, str], calls: int, answers: int) -> str:
    """Run ``check(candidate)`` of the test; the line to report."""
    ask, heard = os.fdopen(calls, "wb"), os.fdopen(answers, "rb")

    def answer() -> Any:
        line = heard.readline(_REPLY)
        if not line.endswith(b"\n"):
            raise _CandidateGoneError
        kind, *rest = json.loads(line)
        if kind == "error":
            raise _raised(str(rest[0]), str(rest[1]))
        return unpack(rest[0])

    def function(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                ask.write(json.dumps([name, pack(args), pack(kwargs)]).encode() + b"\n")
                ask.flush()
            except BrokenPipeError:
                raise _CandidateGoneError from None
            return answer()
        return call

    space: dict[str, Any] = {"__name__": "test"}
    try:
        answer()
        with contextlib.suppress(SyntaxError):  # a prompt that ends within a function has no helpers to give
            exec(compile(test["prompt"], "prompt.py", "exec"), space)
        candidate = space[test["entry_point"]] = function(test["entry_point"])
        exec(compile(test["test"], "test.py", "exec"), space)
        space["check"](candidate)
    except _CandidateGoneError:
        return "ended early"
    except BaseException as error:
        return f"failed {getattr(error, 'told', None) or _told(error)}"
    return "passed"


def _become(work: Callable[[], None], keep: list[int], seconds: float, memory_mb: int) -> int:
    """Fork; the child keeps some files only, gives up everything else, does its work and ends."""
    child = os.fork()
    if child:
        return child
    try:
        _die_with_parent()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        last = 3
        for number in sorted(keep):
            os.closerange(last, number)
            last = number + 1
        os.closerange(last, 4096)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(sys, "set_int_max_str_digits"):
            sys.set_int_max_str_digits(0)
        limit(seconds, memory_mb)
        give_up_privileges()
        if _isolated("calls"):
            filter_calls()
        work()
    finally:
        os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _libc().prctl(_PDEATHSIG, signal.SIGKILL)


def _read_part() -> bytes:
    def exactly(size: int) -> bytes:
        text = b""
        while len(text) < size:
            if not (more := os.read(0, size - len(text))):
                raise EOFError
            text += more
        return text
    return exactly(int.from_bytes(exactly(8), "little"))


def supervise(report: int, seconds: float, memory_mb: int) -> NoReturn:
    """Start candidate and judge, end both at the deadline, report what the judge cannot."""
    deadline = time.monotonic() + seconds
    calls_out, calls_in = os.pipe()
    answers_out, answers_in = os.pipe()
    program = _read_part().decode("utf-8", "surrogatepass")
    candidate = _become(lambda: serve(program, calls_out, answers_in), [calls_out, answers_in], seconds, memory_mb)
    test = json.loads(_read_part())
    for end in (calls_out, answers_in):
        os.close(end)

    def decide() -> None:
        os.write(report, (judge(test, calls_in, answers_out) + "\n").encode("utf-8", "replace"))

    deciding = _become(decide, [calls_in, answers_out, report], seconds, memory_mb)
    for end in (calls_in, answers_out):
        os.close(end)
    open_ = {candidate, deciding}
    while deciding in open_ and time.monotonic() < deadline:
        for process in tuple(open_):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                open_.discard(process)
                if os.WIFSIGNALED(status):
                    late = os.WTERMSIG(status) == signal.SIGXCPU
                    os.write(report, b"timeout\n" if late else b"killed\n")
        time.sleep(0.002)
    if deciding in open_:
        os.write(report, b"timeout\n")
    for process in open_:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    _end_descendants()
    os._exit(0)


def _end_descendants() -> None:
    """Kill whatever is left below us: nothing where calls are filtered, and the kernel's work in a world of our own."""
    while sys.platform == "linux":
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as stream:
                left = [int(word) for word in stream.read().split()]
        except OSError:
            return
        if not left:
            return
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def main() -> None:
    """Isolate; refuse where that is not enough; start process 1 and wait for it."""
    report, seconds, memory_mb, folder = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    required = sys.argv[5].split(",") if sys.argv[5] else []
    _die_with_parent()
    _words[:] = [*isolate(folder), *(["calls"] if can_filter() else [])]
    _die_with_parent()  # a change of user takes that back
    os.write(report, f"isolation {' '.join(_words)}\n".encode())
    if not {*required} <= {*_words}:
        return
    # process 1 of its own world: when it ends, the kernel ends all that is left of it
    child = os.fork()
    if child == 0:
        _die_with_parent()
        if sys.platform == "linux":
            _libc().prctl(_SUBREAPER, 1, 0, 0, 0)
        supervise(report, seconds, memory_mb)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
