"""How a W&B run is started: online where there is a key and a network, else offline, without a question."""

import netrc
import os
import shlex
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb

import train
from train.config.options import TrainConfig

REACHED = 0.8  # seconds in which W&B's server must answer a connection, else the run is kept offline


def attempts(config: TrainConfig, folder: Path, wandb_id: str) -> tuple[list[dict[str, Any]], str]:
    """Options of wandb.init to try one after the other, and why the first is offline where that is worth a line."""
    settings = wandb.Settings(
        silent=True,
        init_timeout=20,
        finish_timeout=60,
        x_transaction_log_flush_interval=2,  # what a killed run may lose, in seconds
        disable_git=True,  # it would run what the repository's configuration names; config has the commit
    )
    options: dict[str, Any] = {"settings": settings}
    flags = {"entity": config.wandb_entity, "tags": config.wandb_tags, "group": config.wandb_group}
    flags |= {"notes": config.wandb_notes, "name": config.wandb_name}
    options |= {name: value for name, value in flags.items() if value}
    if not os.environ.get("WANDB_NAME"):
        options.setdefault("name", folder.name)
    if not os.environ.get("WANDB_DIR"):
        options["dir"] = str(folder)
    if wandb_id:
        options |= {"id": wandb_id, "resume": "allow"}
    offline = options | {"mode": "offline"}
    mode = os.environ.get("WANDB_MODE", "")
    if mode and mode != "online":
        return [options], ""
    server = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    if has_key(server):
        if not reachable(server):  # wandb.init would wait for a minute and a half
            return [offline], f"W&B's server {server} does not answer; the run is kept offline"
    elif not wandb.login(prompt=False):  # else wandb.init would ask, where there is a terminal
        return [offline], "W&B has no key; the run is kept offline" if mode else ""
    return [options, offline], ""


def own_server() -> str:
    """W&B's server by the user's own settings.

    W&B would also ask a settings file of the working directory, which may be anybody's, and send the user's key there.
    """
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    settings = wandb.Settings(root_dir=train.scratch.name, settings_system=str(folder / "settings"))
    settings.update_from_system_settings()
    return settings.base_url


def introduce(run: Any, folder: Path) -> list[str]:
    """Say what the axes are; return where the run is to be found."""
    run.define_metric("global_step")
    run.define_metric("epoch")
    run.define_metric("*", step_metric="global_step")
    run.define_metric("val*", step_metric="epoch")
    if run.disabled:
        return ["wandb      disabled by WANDB_MODE"]
    lines = []
    asked = Path(os.environ.get("WANDB_DIR") or folder)
    if asked.resolve() not in Path(run.dir).resolve().parents:
        lines.append(f"warning: W&B cannot write to {asked}; its files are in {Path(run.dir).parent}")
    return [
        *lines,
        f"wandb      {f'offline; to send it: {sync_command(Path(run.dir).parent)}' if run.offline else run.url}",
    ]


def sync_command(folder: Path) -> str:
    """What sends an offline run: from where it was made, for the run names its model's files from there."""
    here = Path.cwd()
    if not folder.is_relative_to(here):
        return f"wandb sync {shlex.quote(str(folder))}"
    return f"cd {shlex.quote(str(here))} && wandb sync {shlex.quote(str(folder.relative_to(here)))}"


def has_key(server: str) -> bool:
    """Whether this machine has a key for W&B's server: in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(server).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reachable(url: str) -> bool:
    """Whether a server, or the proxy before it, takes a connection within REACHED seconds, name lookup included."""
    parts = urlparse(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlparse(proxy if "//" in proxy else f"//{proxy}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    answers: list[bool] = []

    def connect() -> None:
        try:
            with socket.create_connection((parts.hostname or "", port), timeout=REACHED):
                answers.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)  # a name server that is silent would hold the main thread
    thread.start()
    thread.join(REACHED)
    return bool(answers)
