"""Runs Python programs as forks of a process that has imported torch and what the scripts need beside it, none of the
toolkit: a program begins at once instead of after five seconds. Started and spoken to by processes.py.

A request is a line of JSON on stdin, answered by one on stdout: {"command": [...], "cwd", "env", "out", "err",
"session"} by the process id, {"poll": id} by the exit status, or null before the end.
"""

import json
import os
import runpy
import sys
import warnings

import cv2  # noqa: F401 - and all others that take long
import matplotlib.figure  # noqa: F401
import sklearn.svm  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed.run  # noqa: F401
import torch.utils.tensorboard  # noqa: F401


def serve() -> dict:
    """Answers requests for ever; returns in a child alone: with the request that started it."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            return request
        print(json.dumps(answer), flush=True)
    sys.exit()


def become(request: dict) -> list[str]:
    """Take the place of a new interpreter: session, files, folder, environment, where imports are looked for."""
    if request["session"]:
        os.setsid()
    for descriptor, path in enumerate((os.devnull, request["out"], request["err"])):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if "PYTHONWARNINGS" in os.environ:
        warnings.simplefilter(os.environ["PYTHONWARNINGS"])
    _, *arguments = request["command"]  # without the interpreter
    sys.path[:1] = filter(None, ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return arguments


what, *rest = become(serve())
if what == "-c":
    sys.argv = ["-c", *rest[1:]]
    sys.path.insert(0, "")
    exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
elif what == "-m":
    sys.argv = rest
    sys.path.insert(0, os.getcwd())
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = [what, *rest]
    sys.path.insert(0, os.path.dirname(os.path.abspath(what)))
    runpy.run_path(what, run_name="__main__")
