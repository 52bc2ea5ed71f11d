"""Server of the page of demo.py: by default it answers this machine only; it serves no files but its own."""

import ipaddress
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from demo_app.layout import CSS, build_page
from demo_app.models import Models

POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"  # the browser asks no other server


class Guard:
    """ASGI: refuses other hosts' names (DNS rebinding) and to fetch other servers' files through this one, and has the
    browser load nothing from elsewhere. hosts: names that are answered; None for any."""

    def __init__(self, app, hosts: set[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send):
        async def send_with_policy(event):
            if event["type"] == "http.response.start":
                event["headers"] = [*event["headers"], (b"content-security-policy", POLICY.encode())]
            await send(event)

        reason = self.refusal(scope)
        if reason is None:
            await self.app(scope, receive, send_with_policy)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send_with_policy({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": reason.encode()})

    def refusal(self, scope) -> str | None:
        if scope["type"] not in ("http", "websocket"):
            return None
        if re.search(r"(file=|proxy=)/*https?:", unquote(scope["path"]), re.IGNORECASE):
            return "files of other servers are not fetched"
        name = urlsplit("//" + dict(scope["headers"]).get(b"host", b"").decode("latin-1")).hostname
        if self.hosts is not None and name not in self.hosts:
            return "this page answers this machine only: open it as http://127.0.0.1"
        return None


def allowed_hosts(host: str) -> set[str] | None:
    """Names that a server bound to `host` answers to; None where it serves a network."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    return {"localhost", "127.0.0.1", "::1", host} if loopback else None


def prepare() -> None:
    """Import gradio with its telemetry switched off. Raises ModuleNotFoundError."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SSR_MODE": "False"}
    import gradio  # noqa: F401


def serve(models: Models, folder: Path, *, host: str, port: int, max_upload_mb: float, flags: str = ""):
    """Start to answer, in threads of its own; returns the Blocks, whose close() ends it. flags: of the models, for a
    command line. OSError for a port in use."""
    prepare()
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_EXAMPLES_CACHE": str(folder / "examples")}
    import gradio as gr
    from starlette.middleware import Middleware

    blocks = build_page(models, folder, flags)
    options = dict.fromkeys(("share", "run_history", "enable_monitoring", "mcp_server", "pwa"), False)
    options |= {"server_name": host, "server_port": port, "max_file_size": int(max_upload_mb * 1e6), "css": CSS}
    options["theme"] = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app = {"middleware": [Middleware(Guard, hosts=allowed_hosts(host))], "docs_url": None, "redoc_url": None}
    blocks.launch(**options, quiet=True, prevent_thread_lock=True, footer_links=[], app_kwargs=app)
    return blocks
