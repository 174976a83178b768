"""Run one of the scripts in this process for each case on standard input; say code and messages, as JSON lines."""

import contextlib
import io
import json
import runpy
import sys

for line in sys.stdin:
    script, *arguments = json.loads(line)
    sys.argv = [script, *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:
            code, err = f"{type(error).__name__}: {error}", io.StringIO()
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), file=sys.__stdout__, flush=True)
