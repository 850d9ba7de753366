"""A Kaggle of our own on the loopback interface, for the real, unpatched client.

It models what the wire protocol does (datasets, blobs, notebooks, submissions) and what it does wrong. The client finds it because
`KAGGLE_API_ENVIRONMENT=LOCALHOST` means http://localhost and the proxy settings carry that to this server's port; every other address, and
every CONNECT, ends here too, is refused, and is noted in `escapes`. So no test can reach the real Kaggle.

    with KaggleServer() as kaggle:
        kaggle.fault("put_503")                    # the next PUT breaks off half-way with 503
        subprocess.run([sys.executable, "-m", "kaggle", …], env=kaggle.environment(home))
        kaggle.datasets["alice/my-dataset"].newest.files
"""
import base64
import gzip
import io
import json
import os
import re
import tarfile
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

FAULTS = ("put_503", "put_disconnect", "drop_put", "server_error", "rate_limit", "conflict", "quota", "forbidden", "status_lag", "listing_lag",
          "ingest_failed", "lose_file", "truncate_file", "lost_reply", "zipped_download", "push_error", "invalid_source", "silent_model_source",
          "keeps_internet", "kernel_fails", "output_lag", "submit_refused", "submit_lost")


@dataclass
class Version:
    "One version of a dataset, as it lies in storage."
    files: dict[str, bytes]
    notes: str = ""
    polls: int = 0 # status requests until READY
    failed: bool = False


@dataclass
class Dataset:
    "A dataset with its versions; number 1 is versions[0]."
    meta: dict
    versions: list[Version] = field(default_factory=list)

    @property
    def newest(self) -> Version: return self.versions[-1]


@dataclass
class Blob:
    "An upload on its way."
    name: str
    size: int
    content: bytearray = field(default_factory=bytearray)
    done: bool = False


@dataclass
class Kernel:
    "A notebook with its saved versions."
    saves: list[dict] = field(default_factory=list)
    outputs: list[dict[str, bytes]] = field(default_factory=list)
    polls: int = 0


class HTTPError(Exception):
    "An HTTP status instead of a reply."
    def __init__(self, status: int, message: str = "", headers: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message or f"status {status}", headers or {}


def ingest(name: str, content: bytes) -> dict[str, bytes]:
    "What Kaggle makes of one uploaded file: archives are unpacked, characters vanish from names."
    low = name.lower()
    if low.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as z: inside = {f"{name[:-4]}/{n}": z.read(n) for n in z.namelist() if not n.endswith("/")}
    elif low.endswith((".tar.gz", ".tgz", ".tar")):
        with tarfile.open(fileobj=io.BytesIO(content)) as t: inside = {f"{re.sub('[.](tar.gz|tgz|tar)$', '', name)}/{m.name}": t.extractfile(m).read() for m in t.getmembers() if m.isfile()}
    elif low.endswith(".gz"): inside = {name[:-3]: gzip.decompress(content)}
    else: inside = {name: content}
    return {re.sub(r"[^\x20-\x7e]|[+~]", "", n): c for n, c in inside.items()}


class KaggleServer:
    "The server and everything it knows; use it as a context manager."

    def __init__(self, user: str = "alice", key: str = "0123456789abcdef-secret-key", token: str = "KGAT_0123456789abcdef"):
        self.user, self.key, self.token = user, key, token
        self.datasets: dict[str, Dataset] = {}
        self.kernels: dict[str, Kernel] = {}
        self.blobs: dict[str, Blob] = {}
        self.submissions: list[dict] = []
        self.calls: list[tuple[str, dict]] = [] # (Method, body)
        self.puts: list[tuple[str, int, str]] = [] # (file name, bytes received, Content-Range)
        self.escapes: list[str] = [] # requests for somewhere else
        self.faults: dict[str, int] = {}
        self.run_kernel = lambda save: {"submission.csv": b"id,PredictionString\n"} # what a pushed notebook leaves behind
        self.lock = threading.RLock()

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *words): pass
            def do_CONNECT(self): server.refuse(self)
            def do_POST(self): server.answer(self)
            def do_PUT(self): server.answer(self)
            def do_GET(self): server.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": .05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    def fault(self, name: str, times: int = 1):
        "Plant a fault for the next `times` occasions."
        if name not in FAULTS: raise ValueError(f"fault {name!r}: expected one of {', '.join(FAULTS)}")
        self.faults[name] = self.faults.get(name, 0)+times

    def strikes(self, name: str) -> bool:
        "Whether a planted fault strikes now (and uses it up)."
        with self.lock:
            if self.faults.get(name, 0) <= 0: return False
            self.faults[name] -= 1
            return True

    def environment(self, home: Path, login: str = "key") -> dict[str, str]:
        "The environment in which the real client talks to this server and to nobody else."
        proxy = f"http://127.0.0.1:{self.port}"
        base = {k: v for k, v in os.environ.items() if not k.upper().startswith("KAGGLE") and not k.upper().endswith("_PROXY")}
        names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
        secrets = {"key": {"KAGGLE_USERNAME": self.user, "KAGGLE_KEY": self.key}, "token": {"KAGGLE_API_TOKEN": self.token}, "none": {}}[login]
        (Path(home)/"tmp").mkdir(parents=True, exist_ok=True)
        return base | secrets | {n: proxy for n in names} | {"NO_PROXY": "", "no_proxy": "", "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
                                                              "HOME": str(home), "TMPDIR": str(Path(home)/"tmp"), "XDG_CONFIG_HOME": str(home)}

    # ---- HTTP

    def refuse(self, handler):
        self.escapes.append(f"{handler.command} {handler.path}")
        handler.send_error(502, "only http://localhost is served here")

    def answer(self, handler):
        url = urlsplit(handler.path)
        if url.hostname not in (None, "localhost"): return self.refuse(handler)
        try:
            if handler.command == "PUT": reply = self.put(handler, unquote(url.path).removeprefix("/upload/"))
            elif handler.command == "GET": reply = self.get(unquote(url.path))
            else: reply = self.post(handler, url.path)
        except HTTPError as error: reply = (error.status, json.dumps({"code": error.status, "message": error.message}).encode(), error.headers)
        if reply is None: return # the connection is gone
        status, content, headers = reply
        handler.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items(): handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def check_login(self, handler):
        expected = {"Basic "+base64.b64encode(f"{self.user}:{self.key}".encode()).decode(), f"Bearer {self.token}"}
        if handler.headers.get("Authorization") not in expected: raise HTTPError(401, "Unauthenticated")

    def post(self, handler, path: str):
        body = json.loads(handler.rfile.read(int(handler.headers.get("Content-Length") or 0)) or b"{}")
        service, _, method = path.removeprefix("/api/v1/").partition("/")
        if method == "IntrospectToken": return 200, json.dumps({"active": body.get("token") == self.token, "username": self.user}).encode(), {}
        self.check_login(handler)
        with self.lock: self.calls.append((method, body))
        if self.strikes("server_error"): raise HTTPError(500, "Internal error")
        if self.strikes("rate_limit"): raise HTTPError(429, "Too many requests", {"Retry-After": "0"})
        reply = getattr(self, method, None)
        if reply is None: raise HTTPError(404, f"no method {service}/{method}")
        answer = reply(body)
        if method in ("CreateDataset", "CreateDatasetVersion") and self.strikes("lost_reply"):
            handler.connection.close()
            return None
        return answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode(), {})

    def get(self, path: str):
        _, kind, rest = path.split("/", 2)
        if kind == "dataset-file":
            ref, version, name = re.fullmatch(r"([^/]+/[^/]+)/(\d+)/(.+)", rest).groups()
            content = self.datasets[ref].versions[int(version)-1].files.get(name.removesuffix(".zip") if name.endswith(".json.zip") else name)
            if name.endswith(".json.zip"):
                packed = io.BytesIO()
                with zipfile.ZipFile(packed, "w") as z: z.writestr(name.removesuffix(".zip"), content)
                content = packed.getvalue()
        else:
            ref, number, name = re.fullmatch(r"([^/]+/[^/]+)/(\d+)/(.+)", rest).groups()
            content = self.kernels[ref].outputs[int(number)].get(name)
        if content is None: raise HTTPError(404, "no such file")
        return 200, bytes(content), {"Content-Type": "application/octet-stream"}

    # ---- blobs

    def StartBlobUpload(self, body):
        token = f"token-{len(self.blobs)}"
        self.blobs[token] = Blob(body["name"], body.get("contentLength", 0))
        return {"token": token, "createUrl": f"http://localhost/upload/{token}?upload_id=signature-{token}"}

    def put(self, handler, token: str):
        blob, ranged = self.blobs[token], handler.headers.get("Content-Range", "")
        if ranged.startswith("bytes */"): # how far did we get?
            self.puts.append((blob.name, 0, ranged))
            if blob.done: return 200, b"", {}
            return 308, b"", {"Range": f"bytes=0-{len(blob.content)-1}"} if blob.content else {}
        if handler.headers.get("Transfer-Encoding") == "chunked": length, content = 0, self.read_chunks(handler)
        else:
            length = int(handler.headers.get("Content-Length") or 0)
            broken = self.strikes("put_503"), self.strikes("put_disconnect")
            content = handler.rfile.read(length//2 if any(broken) else length)
            if any(broken):
                blob.content[self.start(ranged):] = content
                self.puts.append((blob.name, len(content), ranged))
                handler.close_connection = True
                if broken[0]: return 503, b"", {}
                handler.connection.close()
                return None
        if self.strikes("drop_put"): return 400, b"", {}
        blob.content[self.start(ranged):] = content
        self.puts.append((blob.name, len(content), ranged))
        blob.done = len(blob.content) == blob.size
        return (200, b"", {}) if blob.done else (400, b"", {})

    @staticmethod
    def start(ranged: str) -> int: return int(re.match(r"bytes (\d+)-", ranged)[1]) if ranged else 0

    @staticmethod
    def read_chunks(handler) -> bytes:
        content = b""
        while size := int(handler.rfile.readline().strip() or b"0", 16):
            content += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return content

    # ---- datasets

    def find(self, body) -> Dataset:
        ref = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if ref not in self.datasets or self.strikes("forbidden"): raise HTTPError(403, "Permission 'datasets.get' was denied")
        return self.datasets[ref]

    def store(self, dataset: Dataset, body):
        files = {}
        for part in body.get("files", []):
            blob = self.blobs[part["token"]]
            files |= ingest(blob.name, bytes(blob.content))
        failed = self.strikes("ingest_failed") or any(c in name for name in files for c in "@&")
        if self.strikes("lose_file"): files.pop(sorted(files)[-1])
        if self.strikes("truncate_file"): name = max(files, key=lambda n: len(files[n])); files[name] = files[name][:-1]
        dataset.versions.append(Version(files, body.get("versionNotes", ""), polls=1, failed=failed))

    def CreateDataset(self, body):
        ref = f"{body['ownerSlug']}/{body['slug']}"
        if self.strikes("quota"): return {"status": "error", "error": "You have exceeded your private dataset storage quota."}
        if ref in self.datasets: return {"status": "error", "error": f"The requested title \"{body['title']}\" is already in use by a dataset. Please choose another title."}
        if len(body.get("files", [])) > 50: return {"status": "error", "error": "Too many top-level files"}
        self.datasets[ref] = Dataset({k: v for k, v in body.items() if k != "files"})
        self.store(self.datasets[ref], body)
        return {"status": "Ok", "url": f"https://www.kaggle.com/datasets/{ref}", "ref": ref}

    def CreateDatasetVersion(self, body):
        ref = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if ref not in self.datasets: raise HTTPError(403, "Permission 'datasets.update' was denied")
        if self.strikes("conflict"): raise HTTPError(409, "Conflict: another version is being processed")
        if self.strikes("quota"): return {"status": "error", "error": "You have exceeded your private dataset storage quota."}
        self.store(self.datasets[ref], body["body"])
        return {"status": "Ok", "url": f"https://www.kaggle.com/datasets/{ref}", "ref": ref}

    def GetDatasetStatus(self, body):
        dataset = self.find(body)
        if self.faults.get("status_lag", 0) > 0 and len(dataset.versions) > 1: return {"status": "READY"}
        if dataset.newest.failed: return {"status": "FAILED"}
        if dataset.newest.polls > 0:
            dataset.newest.polls -= 1
            return {"status": "BLOBS_RECEIVED"}
        return {"status": "READY"}

    def GetDataset(self, body):
        dataset = self.find(body)
        lag = len(dataset.versions) > 1 and self.strikes("status_lag")
        return {"ref": f"{body['ownerSlug']}/{body['datasetSlug']}", "currentVersionNumber": len(dataset.versions)-lag, "isPrivate": dataset.meta.get("isPrivate", False)}

    def GetDatasetMetadata(self, body):
        dataset = self.find(body)
        return {"info": {"title": dataset.meta.get("title"), "isPrivate": dataset.meta.get("isPrivate", False), "licenses": [{"name": dataset.meta.get("licenseName")}]}}

    def number(self, dataset: Dataset, body) -> int:
        lag = len(dataset.versions) > 1 and self.strikes("listing_lag")
        number = body.get("datasetVersionNumber") or len(dataset.versions)
        if number > len(dataset.versions): raise HTTPError(404, "no such version")
        return number-lag

    def ListDatasetFiles(self, body):
        dataset = self.find(body)
        files = dataset.versions[self.number(dataset, body)-1].files
        start, size = int(body.get("pageToken") or 0), body.get("pageSize", 20)
        rows = [{"name": n, "totalBytes": len(c), "creationDate": "2026-11-20T12:00:00.000Z"} for n, c in sorted(files.items())]
        return {"datasetFiles": rows[start:start+size]} | ({"nextPageToken": str(start+size)} if start+size < len(rows) else {})

    def DownloadDataset(self, body):
        dataset = self.find(body)
        number, name = self.number(dataset, body), body["fileName"]
        if name not in dataset.versions[number-1].files: raise HTTPError(404, "no such file")
        suffix = ".zip" if self.strikes("zipped_download") else ""
        return 302, b"", {"Location": f"http://localhost/dataset-file/{body['ownerSlug']}/{body['datasetSlug']}/{number}/{quote(name)}{suffix}"}

    # ---- notebooks and submissions

    def SaveKernel(self, body):
        ref = body["slug"]
        if self.strikes("push_error"): return {"error": "Maximum batch GPU session count of 2 reached."}
        kernel, saved = self.kernels.setdefault(ref, Kernel()), dict(body)
        unknown = [d for d in body.get("datasetDataSources", []) if d not in self.datasets]
        if self.strikes("invalid_source"): unknown = body.get("datasetDataSources", [])[:1]
        saved["datasetDataSources"] = [d for d in body.get("datasetDataSources", []) if d not in unknown]
        if self.strikes("silent_model_source"): saved["modelDataSources"] = []
        if self.strikes("keeps_internet"): saved["enableInternet"] = True
        kernel.saves.append(saved)
        kernel.polls = 1
        kernel.outputs.append({} if self.faults.get("kernel_fails", 0) else self.run_kernel(saved))
        return {"ref": f"/code/{ref}", "url": f"https://www.kaggle.com/code/{ref}", "versionNumber": len(kernel.saves), "invalidDatasetSources": unknown}

    def find_kernel(self, body) -> tuple[str, Kernel]:
        ref = f"{body['userName']}/{body['kernelSlug'].split('/')[0]}"
        if ref not in self.kernels or self.strikes("forbidden"): raise HTTPError(403, "Permission 'kernels.get' was denied")
        return ref, self.kernels[ref]

    def GetKernel(self, body):
        ref, kernel = self.find_kernel(body)
        saved = kernel.saves[-1]
        keep = ("datasetDataSources", "kernelDataSources", "competitionDataSources", "modelDataSources", "enableGpu", "enableInternet", "isPrivate", "machineShape")
        image = saved.get("dockerImage") or "gcr.io/kaggle-gpu-images/python@sha256:"+"ab"*32
        return {"metadata": {"id": 7, "ref": ref, "title": saved.get("newTitle"), "slug": ref.split("/")[1], "language": saved["language"], "kernelType": saved["kernelType"],
                             "currentVersionNumber": len(kernel.saves), "dockerImage": image} | {k: saved[k] for k in keep if k in saved},
                "blob": {"source": saved["text"], "language": saved["language"], "kernelType": saved["kernelType"], "slug": ref.split("/")[1]}}

    def GetKernelSessionStatus(self, body):
        _, kernel = self.find_kernel(body)
        if kernel.polls > 0:
            kernel.polls -= 1
            return {"status": "RUNNING"}
        if self.strikes("kernel_fails"): return {"status": "ERROR", "failureMessage": "Notebook Threw Exception"}
        return {"status": "COMPLETE"}

    def ListKernelSessionOutput(self, body):
        ref, kernel = self.find_kernel(body)
        number = len(kernel.outputs)-1-(len(kernel.outputs) > 1 and self.strikes("output_lag"))
        files = [{"fileName": n, "url": f"http://localhost/kernel-file/{ref}/{number}/{quote(n)}"} for n in sorted(kernel.outputs[number])]
        return {"files": files, "log": json.dumps([{"stream_name": "stdout", "data": "done\n"}])}

    def CreateCodeSubmission(self, body):
        ref = f"{body['kernelOwner']}/{body['kernelSlug']}"
        saved = self.kernels.get(ref)
        if saved is None or body.get("kernelVersion", 0) > len(saved.saves): raise HTTPError(404, "Notebook not found")
        if self.strikes("submit_refused"): return {"message": "Submission not allowed: You have used all your submissions for today.", "ref": 0}
        row = {"ref": 1000+len(self.submissions), "fileName": body["fileName"], "description": body.get("submissionDescription", ""), "status": "PENDING",
               "date": "2026-11-20T12:00:00.000Z", "competition": body["competitionName"], "kernel": ref, "version": body.get("kernelVersion")}
        if not self.strikes("submit_lost"): self.submissions.append(row)
        return {"message": f"Successfully submitted to {body['competitionName']}", "ref": row["ref"]}

    def ListSubmissions(self, body):
        rows = [s for s in reversed(self.submissions) if s["competition"] == body["competitionName"]]
        return {"submissions": [{k: s[k] for k in ("ref", "fileName", "description", "status", "date")} for s in rows[:body.get("pageSize", 20)]]}

    def GetSubmissionLimits(self, body):
        return {"numToday": len(self.submissions), "numAllowedNow": 5-len(self.submissions)}
