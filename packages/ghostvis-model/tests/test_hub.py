"""A hub id is downloaded by the hub's own client, here from a small server that answers as a hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file

from ghostvis_model import checkpoint
from ghostvis_model.config import VLMConfig, qwen25_config
from ghostvis_model.hf_weights import export_qwen
from ghostvis_model.vlm import GhostVis

COMMIT = "0123456789abcdef0123456789abcdef01234567"

PROGRAM = """
import sys
import torch
from ghostvis_model import GhostVis
from ghostvis_model.vision import VisionTower, load_encoder_weights
from ghostvis_model.checkpoint import CheckpointError

ids = torch.arange(12)[None]
for name in ("ghost/run", "ghost/qwen"):
    model = GhostVis.from_pretrained(name, device="cpu")
    print(name, f"{model(ids).double().sum():.6f}")
tower = VisionTower(GhostVis.from_pretrained("ghost/run", device="cpu").config.vision)
load_encoder_weights(tower, "ghost/eyes")
print("ghost/eyes", f"{sum(p.double().sum() for p in tower.encoder.parameters()):.6f}")
for load in (lambda: GhostVis.from_pretrained("ghost/nobody"), lambda: load_encoder_weights(tower, "ghost/nobody")):
    try:
        load()
    except CheckpointError as error:
        print("ghost/nobody" in str(error), "hub id" in str(error))
"""


def hub(repositories: dict[str, Path]) -> ThreadingHTTPServer:
    """A server of folders by repository id: the listing of a repository, and its files with their hashes."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, body: bytes, **headers: str) -> None:
            self.send_response(200)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            parts = urlsplit(self.path).path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            folder = repositories.get("/".join(parts[2:4] if api else parts[:2]))
            if folder is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif api:
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                names = {str(path.relative_to(folder)): path.stat().st_size for path in files}
                tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in names.items()]
                facts = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": f} for f in names]}
                body = tree if "tree" in parts else facts  # newer clients list by the one, older by the other
                self.answer(json.dumps(body).encode(), Content_Type="application/json")
            else:
                body = (folder / "/".join(parts[4:])).read_bytes()
                self.answer(body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@torch.inference_mode()
def test_a_hub_id_loads_a_run_a_qwen_and_an_encoder_and_an_unknown_one_is_named(model, tmp_path):
    ids = torch.arange(12)[None]
    run = tmp_path / "run"
    checkpoint.save(run, 7, model, model.tokenizer, {"config": model.config.to_dict()})
    qwen = GhostVis(VLMConfig(qwen25_config("tiny"))).eval()
    export_qwen(qwen, tmp_path / "qwen")
    (tmp_path / "eyes").mkdir()
    save_file(model.vision.encoder.state_dict(), tmp_path / "eyes" / "model.safetensors")
    server = hub({f"ghost/{name}": tmp_path / name for name in ("run", "qwen", "eyes")})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=200
        )
    finally:
        server.shutdown()
        server.server_close()
    eyes = sum(parameter.double().sum() for parameter in model.vision.encoder.parameters())
    assert done.stdout.splitlines() == [
        f"ghost/run {model(ids).double().sum():.6f}",
        f"ghost/qwen {qwen(ids).double().sum():.6f}",
        f"ghost/eyes {eyes:.6f}",
        "True True",
        "True True",
    ], done.stderr[-3000:]
