"""The commit that a run is started in, asked so that nothing in that repository is executed."""

import os
import subprocess


def git_state() -> str:
    """Commit of the working directory's repository; empty where it has none.

    Not whether files differ from it: to compare them git runs what a repository's own configuration names (filters,
    fsmonitor, hooks, submodules, the transport of a partial clone), in more ways than can be closed from outside.
    """
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "rev-parse", "--verify", "HEAD"],
            capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=5,
            env=os.environ | {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none", "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
        return done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.SubprocessError):
        return ""
