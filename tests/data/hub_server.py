"""A hub that serves data sets from a folder: what `datasets` asks for, and nothing more."""

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_ROUTE = re.compile(
    r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(resolve|tree|revision|paths-info)/[^/]+/?(.*))?"
)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gated = ("terms.jsonl",)  # files that nobody may have, of sets that all may list

    def __init__(self, root: Path, tokens: dict[str, str], renamed: dict[str, str], *given: Any):
        self.root, self.tokens, self.renamed = root, tokens, renamed
        super().__init__(*given)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        route = _ROUTE.fullmatch(path)
        if route is None:
            return self._send(404)
        name, kind, file = route.groups()
        if name in self.renamed:
            return self._send(307, Location=path.replace(name, self.renamed[name]))
        folder, token = self.root / name, self.tokens.get(name)
        if not folder.is_dir() or (
            token and self.headers.get("Authorization") != f"Bearer {token}"
        ):
            return self._send(401, b"", **{"X-Error-Code": "RepoNotFound"})
        paths = sorted(folder.rglob("*"))
        commit = hashlib.sha1(b"".join(p.read_bytes() for p in paths if p.is_file())).hexdigest()
        if kind in (None, "revision"):
            files = self._entries(folder, paths, "file")
            siblings = [{"rfilename": file["path"], "size": file["size"]} for file in files]
            return self._send_json({"id": name, "sha": commit, "siblings": siblings})
        if kind == "tree":
            inside = [p for p in paths if p.parent == folder / file]
            if inside:
                return self._send_json(self._entries(folder, inside))
        if kind == "paths-info":
            wanted = [folder / p for p in json.loads(body)["paths"]]
            return self._send_json(self._entries(folder, [p for p in wanted if p.exists()]))
        if kind == "tree" or not (folder / file).is_file():
            return self._send(404, b"", **{"X-Error-Code": "EntryNotFound"})
        if file in self.gated:
            return self._send(403, b"", **{"X-Error-Code": "GatedRepo"})
        content = (folder / file).read_bytes()
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._send(200, content, **{"ETag": etag, "X-Repo-Commit": commit})

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _entries(self, folder: Path, paths: list[Path], kind: str = "") -> list[dict[str, Any]]:
        entries = [
            {
                "type": "file" if p.is_file() else "directory",
                "path": p.relative_to(folder).as_posix(),
                "size": p.stat().st_size if p.is_file() else 0,
                "oid": hashlib.sha1(p.read_bytes() if p.is_file() else b"").hexdigest(),
            }
            for p in paths
        ]
        return [entry for entry in entries if kind in ("", entry["type"])]

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes = b"", /, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving(
    root: Path, tokens: dict[str, str] | None = None, renamed: dict[str, str] | None = None
) -> Iterator[str]:
    """Serve the data sets OWNER/NAME in `root`; yield the address for HF_ENDPOINT.

    `tokens` are those that private sets need; `renamed` gives the new names of sets that moved.
    """
    handler = partial(_Handler, root, tokens or {}, renamed or {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
