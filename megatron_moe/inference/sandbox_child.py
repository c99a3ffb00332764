"""What the sandbox runs first: give up everything, then run the program that comes through stdin.

Run as a file by a fresh interpreter, with the limits as JSON in its argument; only the standard library is
here. Exit code 97: this system does not let a process shut itself in, with the reason on stderr.
"""

import ctypes
import json
import os
import resource
import sys

CANNOT_ISOLATE = 97
NOBODY = 65534

_NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""Of mounts, host names, IPC, process ids and networks (sched.h). A new network has no device but a loopback
that is down."""
_NEW_USER = 0x10000000
_MOUNT_SETATTR, _AT_FDCWD, _RECURSIVE = 442, -100, 0x8000
_READ_ONLY_NO_SETUID = 0x1 | 0x2
_PRIVATE, _BIND = 0x40000 | 0x4000, 0x1000 | 0x4000
_NO_NEW_PRIVILEGES, _PARENT_DEATH_SIGNAL, _SIGKILL = 38, 1, 9

_CAPABILITIES_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    limits = json.loads(sys.argv[1])
    program = sys.stdin.buffer.read()
    try:
        _leave_everything(limits["folder"], limits["file_bytes"])
    except OSError as error:
        print(error, file=sys.stderr)
        os._exit(CANNOT_ISOLATE)
    child = os.fork()
    if child:  # the child is the first process of its namespace: when it ends, all that it started ends
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    # In a user namespace of its own the process could else mount what it just made read-only.
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)()
    _call(_libc.capset, header, none)
    # Another user or other capabilities would take it away again.
    _call(_libc.prctl, _PARENT_DEATH_SIGNAL, _SIGKILL, 0, 0, 0)
    _call(_libc.prctl, _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for kind, most in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    os.chdir(limits["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})


def _leave_everything(folder: str, bytes_there: int) -> None:
    """New namespaces, in which all files are read-only but for a small file system of its own in `folder`."""
    user, group = os.geteuid(), os.getegid()
    _call(_libc.unshare, _NEW_NAMESPACES | (_NEW_USER if user else 0))
    if user:  # the same user inside, who may mount there
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _call(_libc.mount, None, b"/", None, _PRIVATE, None)
    options = f"size={bytes_there},mode=0777".encode()
    _call(_libc.mount, b"sandbox", folder.encode(), b"tmpfs", 0, options)
    # struct mount_attr: set, clear, propagation, user namespace
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NO_SETUID, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    _call(_libc.syscall, _MOUNT_SETATTR, _AT_FDCWD, b"/", _RECURSIVE, attributes, size)
    writable = (ctypes.c_uint64 * 4)(0, 0x1, 0, 0)
    _call(_libc.syscall, _MOUNT_SETATTR, _AT_FDCWD, folder.encode(), 0, writable, size)
    # The interpreter may lie where only its owner looks.
    library = os.path.dirname(os.__file__)
    seen_at = os.path.join(folder, ".library")
    os.mkdir(seen_at)
    _call(_libc.mount, library.encode(), seen_at.encode(), None, _BIND, None)
    sys.path[:] = [seen_at, os.path.join(seen_at, "lib-dynload")]
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        if hasattr(module, "__path__"):
            module.__path__ = [place.replace(library, seen_at) for place in module.__path__]


def _call(function, *arguments) -> None:  # type: ignore[no-untyped-def]
    if function(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
