"""Run one of the scripts in this process for each case on standard input; say code and messages, as JSON lines.

With `forbid` no case may open a connection or start a program but the check of the labels; what was tried is told.
"""

import contextlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
from typing import Any

tried: list[str] = []
CHECK = ["-P", "-m", "train.data.check"]


def forbid(module: Any, name: str) -> None:
    usual = getattr(module, name)

    def refuse(*arguments: Any, **options: Any) -> Any:
        if name == "Popen" and arguments[0] == [sys.executable, *CHECK]:
            return usual(*arguments, **options)
        tried.append(f"{name}: {str(arguments[1:] if isinstance(arguments[0], socket.socket) else arguments)[:200]}")
        raise PermissionError(name)

    setattr(module, name, refuse)


def main() -> None:
    if "forbid" in sys.argv:
        import torch  # noqa: F401  # asks for the machine's properties when it is imported
        import ultralytics  # noqa: F401

        for name in ("connect", "connect_ex", "bind", "sendto"):
            forbid(socket.socket, name)
        for module, name in ((socket, "getaddrinfo"), (subprocess, "Popen"), (os, "system"), (os, "popen")):
            forbid(module, name)
        for name in ("posix_spawn", "execv", "execve", "execvp"):
            forbid(os, name)
        import posix  # what a pickle calls os.system

        forbid(posix, "system")
    for line in sys.stdin:
        script, *arguments = json.loads(line)
        sys.argv = [script, *arguments]
        tried.clear()
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
            except BaseException as error:
                code, err = f"{type(error).__name__}: {error}", io.StringIO()
        said = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "tried": tried}
        print(json.dumps(said), file=sys.__stdout__, flush=True)


main()
