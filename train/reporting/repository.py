"""The state of the repository that a run is started in, asked so that nothing in that repository is executed."""

import subprocess

# What a repository's own configuration may name to be run while files are compared. Submodules have configurations of
# their own, so they are not looked into; filters are dealt with below, for each has a name.
SAFE = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "--no-optional-locks", "--no-pager")


def git_state() -> str:
    """Commit of the working directory's repository, with -dirty where files differ from it; empty where it has none."""
    try:
        commit = _git(*SAFE, "rev-parse", "HEAD").strip()
        if not commit:
            return ""
        options = list(SAFE)
        for line in _git(*SAFE, "config", "--show-scope", "--name-only", "--get-regexp", r"^filter\.").splitlines():
            scope, _, name = line.partition("\t")
            if scope in ("local", "worktree"):
                if "=" in name:  # which cannot be overridden
                    return commit
                options += ["-c", f"{name}="]
        changed = _git(*options, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
        return commit + "-dirty" * bool(changed.strip())
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    """What git says; nothing where it fails."""
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=5
    ).stdout
