"""A local double of the Hub on loopback: enough of its HTTP interface to create, upload, list, download and stream.

Repositories live in memory, with every commit kept; branches start where `main` is. Large files go the LFS
way (batch, PUT), small ones inside the commit, as on the Hub; Xet is not spoken. Writing needs the token. Cards are
checked by `/api/validate-yaml` for what the real Hub refuses most often (see `card_errors`). A commit that leaves more
than `MAX_FILES_PER_FOLDER` files in one folder is refused.

The Hugging Face libraries read their endpoint when they are imported, so what talks to the double runs in a process of
its own, with `HubDouble.environment` and its own `HF_HOME`: two datasets of one name would share a cache otherwise.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "doubleDOUBLEdoubleDOUBLEdouble1234"
USER = "someone"

#: What the Hub's documentation allows, "Repository limitations and recommendations".
MAX_FILES_PER_FOLDER = 10_000

_LFS_SUFFIXES = (".safetensors", ".bin", ".mp4", ".parquet", ".png", ".arrow")
_LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc0-1.0", "other", "unknown"}
_API = re.compile(
    r"/api/(?P<type>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>[a-z-]+)(?:/(?P<rest>.*))?)?$"
)
_RESOLVE = re.compile(r"/(?P<type>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)$")
_LFS_BATCH = re.compile(r"/(?:datasets/|spaces/)?[^/]+/[^/]+\.git/info/lfs/objects/batch$")

Files = dict[str, bytes]


@dataclass
class Repository:
    """All commits of one repository, oldest first: sha and the whole tree."""

    private: bool
    commits: list[tuple[str, Files]] = field(default_factory=lambda: [("0" * 40, {})])
    branches: dict[str, list[tuple[str, Files]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches["main"] = self.commits

    @property
    def files(self) -> Files:
        """The tree of `main`."""
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, Files] | None:
        """Sha and tree of a revision, or None."""
        if (name := revision.removeprefix("refs/heads/")) in self.branches:
            return self.branches[name][-1]
        return next((commit for commits in self.branches.values() for commit in commits if commit[0] == revision), None)

    def commit(self, files: Files, branch: str = "main") -> str:
        state = "".join(f"{path}\0{hashlib.sha256(data).hexdigest()}\n" for path, data in sorted(files.items()))
        commits = self.branches[branch]
        sha = hashlib.sha1((commits[-1][0] + state).encode()).hexdigest()
        commits.append((sha, files))
        return sha


class HubDouble:
    """The double, as a context manager; it serves while it is entered."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS objects by sha256
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> HubDouble:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, repo_type: str = "model") -> Files:
        """What `main` of a repository holds."""
        return self.repositories[repo_type, repo_id].files

    def environment(self, hf_home: Path) -> dict[str, str]:
        """The environment of a process that shall know this Hub, and no other."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(hf_home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def call(self, function: Callable[..., Any], *arguments: object, cwd: Path, hf_home: Path) -> Any:
        """What `function`, of a test module and called in a fresh Python process, returns as JSON.

        Args:
            arguments: Reach it as texts.
            cwd: The process's working directory; made where it is not there.
            hf_home: Its cache.
        """
        name = function.__name__
        program = (
            f"import json, sys; from {function.__module__} import {name} as f; print(json.dumps(f(*sys.argv[1:])))"
        )
        cwd.mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=cwd,
            env=self.environment(hf_home) | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, f"{name} failed\n{result.stdout}\n{result.stderr}"
        return json.loads(result.stdout.splitlines()[-1])


def card_errors(content: str) -> list[str]:
    """What the Hub would refuse of a card: YAML that does not parse, and fields of a wrong type, form or name."""
    match = re.match(r"---\n(.*?)\n---(?:\n|$)", content, re.DOTALL)
    if match is None:
        return ["the card has no YAML block"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["the YAML block is no mapping"]
    errors = []
    repo_id = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
    for name in ("base_model", "datasets"):
        errors += [
            f'"{name}" must be a repository id, got {value!r}'
            for value in _as_list(data.get(name))
            if not (isinstance(value, str) and repo_id.fullmatch(value))
        ]
    tags = data.get("tags", [])
    if not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        errors.append(f'"tags" must be a list of texts, got {tags!r}')
    if not set(_as_list(data.get("license"))) <= _LICENCES:
        errors.append(f'"license" must be of the Hub\'s, got {data["license"]!r}')
    errors += [
        f'"configs" must name config_name and data_files, got {config!r}'
        for config in data.get("configs", [])
        if not isinstance(config, dict) or not {"config_name", "data_files"} <= config.keys()
    ]
    for entry in data.get("model-index", []):
        if not (isinstance(entry, dict) and isinstance(entry.get("name"), str) and entry.get("results")):
            errors.append(f'"model-index" needs name and results, got {entry!r}')
            continue
        for result in entry["results"]:
            whole = result.get("task", {}).get("type") and {"name", "type"} <= result.get("dataset", {}).keys()
            if not whole or not all({"type", "value"} <= metric.keys() for metric in result.get("metrics", [{}])):
                errors.append(f'"model-index" holds a result without task, dataset or metrics: {result!r}')
    return errors


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; `hub` is set by `HubDouble`."""

    hub: HubDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.hub.requests.append(format % args)

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # ------------------------------------------------------------------------------------------------------ reading

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path == "/api/whoami-v2":
            self._answer(200, {"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        elif match := _RESOLVE.match(path):
            self._resolve((match["type"] or "models/").rstrip("s/"), match["repo"], match["rev"], match["path"])
        elif match := _API.match(path):
            self._api_get(match, parse_qs(url.query))
        else:
            self._missing("EntryNotFound")

    def _resolve(self, repo_type: str, repo_id: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get((repo_type, repo_id))
        if repository is None:
            return self._missing("RepoNotFound")
        commit = repository.at(revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        sha, files = commit
        if path not in files:
            return self._missing("EntryNotFound")
        data = files[path]
        headers = {"ETag": f'"{_oid(path, data)}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
            if start >= len(data):
                return self._answer(416, b"", Content_Range=f"bytes */{len(data)}")
            return self._answer(206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", **headers)
        return self._answer(200, data, **headers)

    def _api_get(self, match: re.Match[str], query: dict[str, list[str]]) -> None:
        repository = self.hub.repositories.get((match["type"], match["repo"]))
        if repository is None:
            return self._missing("RepoNotFound")
        verb, rest = match["verb"], match["rest"] or ""
        if verb == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1][0]}
                for name, commits in repository.branches.items()
            ]
            return self._answer(200, {"branches": branches, "tags": [], "converts": []})
        if verb == "auth-check":
            return self._answer(200) if self._may_write() else self._answer(403, {"error": "no write access"})
        revision, _, folder = rest.partition("/") if verb else ("main", "", "")
        commit = repository.at(revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        sha, files = commit
        if verb in (None, "revision"):
            return self._answer(
                200,
                {
                    "id": match["repo"],
                    "sha": sha,
                    "private": repository.private,
                    "disabled": False,
                    "gated": False,
                    "cardData": _card_data(files),
                    "tags": [],
                    "siblings": [{"rfilename": path} for path in files],
                },
            )
        if verb == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            entries = _tree(files, folder, recursive)
            return self._answer(200, entries) if entries or not folder else self._missing("EntryNotFound")
        return self._missing("EntryNotFound")

    # ------------------------------------------------------------------------------------------------------ writing

    def do_PUT(self) -> None:
        oid, data = self.path.rpartition("/")[2], self._body()
        if hashlib.sha256(data).hexdigest() != oid:
            return self._answer(400, {"error": f"content is not that of {oid}"})
        self.hub.objects[oid] = data
        return self._answer(200)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/validate-yaml":
            request = json.loads(body)
            errors = card_errors(request["content"])
            return self._answer(
                400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []}
            )
        match = _API.match(path)
        if match and match["verb"] == "paths-info":
            return self._paths_info(match, body)
        if not self._may_write():
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if _LFS_BATCH.match(path):
            return self._lfs_batch(json.loads(body))
        repository = self.hub.repositories.get((match["type"], match["repo"])) if match else None
        if match is None or repository is None:
            return self._missing("RepoNotFound")
        if match["verb"] == "preupload":
            return self._preupload(repository, json.loads(body))
        if match["verb"] == "branch":
            if match["rest"] in repository.branches:
                return self._answer(409, {"error": "Reference already exists"})
            repository.branches[match["rest"]] = [repository.commits[-1]]
            return self._answer(200)
        if match["verb"] == "commit":
            if match["rest"] not in repository.branches:
                return self._missing("RevisionNotFound")
            return self._commit(repository, match, body)
        return self._missing("EntryNotFound")

    def _create(self, request: dict[str, Any]) -> None:
        repo_type = request.get("type") or "model"
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        address = f"{self.hub.url}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
        with self.hub.lock:
            known = (repo_type, repo_id) in self.hub.repositories
            if not known:
                self.hub.repositories[repo_type, repo_id] = Repository(request.get("visibility") == "private")
        status, answer = (409, {"error": "You already created this repo"}) if known else (200, {})
        self._answer(status, {**answer, "url": address, "name": repo_id, "id": repo_id})

    def _lfs_batch(self, request: dict[str, Any]) -> None:
        objects = []
        for wanted in request["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _preupload(self, repository: Repository, request: dict[str, Any]) -> None:
        files = []
        for wanted in request["files"]:
            path, known = wanted["path"], repository.files.get(wanted["path"])
            files.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(_LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": None if known is None else _oid(path, known),
                }
            )
        self._answer(200, {"files": files})

    def _commit(self, repository: Repository, match: re.Match[str], body: bytes) -> None:
        with self.hub.lock:
            files = dict(repository.branches[match["rest"]][-1][1])
            for line in body.splitlines():
                entry = json.loads(line)
                key, value = entry["key"], entry["value"]
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        return self._answer(400, {"error": f"no such LFS object: {value['oid']}"})
                    files[value["path"]] = self.hub.objects[value["oid"]]
                elif key == "deletedFile":
                    del files[value["path"]]
                elif key == "deletedFolder":
                    files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
            if crowded := [name for name, number in _files_per_folder(files).items() if number > MAX_FILES_PER_FOLDER]:
                return self._answer(400, {"error": f"over {MAX_FILES_PER_FOLDER} files per directory: {crowded}"})
            # As the Hub does: a commit with a bad card is refused.
            if "README.md" in files and (errors := card_errors(files["README.md"].decode())):
                return self._answer(400, {"error": f"Invalid metadata in README.md: {errors}"})
            sha = repository.commit(files, match["rest"])
        prefix = "" if match["type"] == "model" else f"{match['type']}s/"
        url = f"{self.hub.url}/{prefix}{match['repo']}/commit/{sha}"
        return self._answer(200, {"commitOid": sha, "commitUrl": url, "hookOutput": "", "success": True})

    def _paths_info(self, match: re.Match[str], body: bytes) -> None:
        repository = self.hub.repositories.get((match["type"], match["repo"]))
        commit = repository.at(match["rest"]) if repository else None
        if commit is None:
            return self._missing("RevisionNotFound")
        if "json" in (self.headers.get("Content-Type") or ""):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode())["paths"]
        wanted = {path.strip("/") for path in ([paths] if isinstance(paths, str) else paths)}
        entries = _tree(commit[1], "", recursive=True)
        return self._answer(200, [entry for entry in entries if entry["path"] in wanted])


def _files_per_folder(files: Files) -> Counter[str]:
    return Counter(path.rpartition("/")[0] for path in files)


def _oid(path: str, data: bytes) -> str:
    """What the Hub gives as a file's ETag: the sha256 of LFS files, the git blob id of others."""
    if path.endswith(_LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tree(files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, data in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            parent = prefix + "/".join(parts[:depth])
            if recursive or depth == 1:
                oid = hashlib.sha1(parent.encode()).hexdigest()
                entries[parent] = {"type": "directory", "oid": oid, "size": 0, "path": parent}
        if recursive or len(parts) == 1:
            oid = _oid(path, data)
            entry: dict[str, Any] = {"type": "file", "oid": oid, "size": len(data), "path": path}
            if path.endswith(_LFS_SUFFIXES):
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
            entries[path] = entry
    return list(entries.values())


def _card_data(files: Files) -> dict[str, Any]:
    match = re.match(rb"---\n(.*?)\n---", files.get("README.md", b""), re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}
