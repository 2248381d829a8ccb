"""What the launcher settles for the frontend: https, sizes, and the settings that are shown."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from support.server import free_port

from ramet.launch.config import resolve, tls
from ramet.launch.model_info import ModelInfo
from ramet.launch.model_source import ResolvedModel
from ramet.launch.serve import print_ready
from ramet.launch.server_args import ConfigError, ServerArgs, parse_size
from ramet.model_runner.config import LoadFormat

MODEL = ResolvedModel(
    name="org/model",
    weights="/w",
    load_format=LoadFormat.SAFETENSORS,
    model_dir="/m",
    tokenizer_dir="/t",
    info=ModelInfo(
        context_length=2048,
        vocab_size=100,
        dtype="bfloat16",
        eos_ids=(2,),
        default_sampling={},
    ),
)


def make_tls(folder: Path) -> Path:
    path = folder / "server.pem"
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(path)
    return path


def test_tls_files_are_read_once_before_anything_else(tmp_path: Path) -> None:
    good = str(make_tls(tmp_path))
    assert tls(ServerArgs()) is None
    found = tls(ServerArgs(ssl_certfile=good))
    assert found is not None
    assert (found.ssl_certfile, found.ssl_keyfile, found.ssl_ca_certs) == (good, None, None)
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    encrypted = tmp_path / "encrypted.pem"
    key = serialization.load_pem_private_key(Path(good).read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"word")
    formats = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    encrypted.write_bytes(key.private_bytes(*formats, secret))
    assert tls(ServerArgs(ssl_certfile=good, ssl_keyfile=str(encrypted), ssl_keyfile_password="word"))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"ssl_certfile": "/nowhere.pem"}, "'/nowhere.pem'"),
        ({"ssl_certfile": str(bad)}, "bad.pem"),
        ({"ssl_certfile": good, "ssl_ca_certs": str(bad)}, "ssl_ca_certs"),
        ({"ssl_certfile": good, "ssl_keyfile": str(encrypted)}, "encrypted.pem"),
        ({"ssl_certfile": good, "ssl_keyfile": str(encrypted), "ssl_keyfile_password": "wrong"}, "encrypted.pem"),
        ({"ssl_keyfile": good}, "ssl_keyfile needs ssl_certfile"),
        ({"ssl_ca_certs": good}, "ssl_ca_certs needs ssl_certfile"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ConfigError, match=words):
            tls(ServerArgs(**arguments))


def test_a_bad_certificate_is_told_before_the_model_is_looked_for() -> None:
    command = [sys.executable, "-m", "ramet.launch_server", "--model-path", "/nowhere/at/all"]
    arguments = ["--port", str(free_port()), "--ssl-certfile", "/nowhere.pem"]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ssl_certfile '/nowhere.pem'")
    assert "Traceback" not in ended.stderr


def test_the_address_shown_is_the_one_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve(ServerArgs(ssl_certfile=str(make_tls(tmp_path)), device="cpu"), MODEL)
    print_ready(config)
    assert "https://127.0.0.1:30000/v1" in capsys.readouterr().out


def test_settings_have_no_secrets() -> None:
    args = ServerArgs(api_key=("s3cret-1",), device="cpu", max_body_size="1KiB", cors_allow_origins=("*",))
    frontend = resolve(args, MODEL).frontend
    assert "s3cret" not in repr(frontend.settings)
    assert (frontend.settings["device"], frontend.settings["max_total_tokens"]) == ("cpu", None)
    assert frontend.settings["max_running_requests"] == 64
    assert (frontend.max_body_bytes, frontend.cors_allow_origins) == (1024, ("*",))


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("1000", 1000),
        (1000, 1000),
        ("2KB", 2000),
        ("2kib", 2048),
        ("64 MB", 64_000_000),
        ("32MiB", 2**25),
        ("1GiB", 2**30),
    ],
)
def test_sizes(given: str | int, size: int) -> None:
    assert parse_size(given) == size


@pytest.mark.parametrize("given", ["", "0", "-1", "1.5MB", "MB", "10 bytes", "1TB", 0])
def test_sizes_that_are_none(given: str | int) -> None:
    with pytest.raises(ValueError, match="is not a number of bytes"):
        parse_size(given)
