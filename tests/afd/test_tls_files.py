"""The files of ``transport.tls_*``: named by the key that is wrong, never left out in silence."""

import subprocess
import sys
from pathlib import Path

import pytest

from step3_hetero import SamplingParams, load
from step3_hetero.afd.tls import transport_of
from step3_hetero.config import Config
from step3_hetero.errors import ConfigError
from step3_hetero.runtime.request import Request
from step3_hetero.transport.base import TlsFiles
from step3_hetero.transport.tls import TlsStream

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits.yaml"


def config(folder, **transport):
    values = {"version": 1, "model": "step3", "transport": {"kind": "tcp", **transport},
              "roles": {"a": {"stages": ["ffn"], "backend": "cpu"}}}  # fmt: skip
    return Config.from_dict(values, folder)


@pytest.fixture
def folder(tmp_path):
    for name, mode in (("c.pem", 0o644), ("c.key", 0o600), ("open.key", 0o640), ("ca.pem", 0o644)):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(mode)
    return tmp_path


def test_files_are_found_beside_the_config(folder):
    transport = transport_of(config(folder, tls_cert="c.pem", tls_key="c.key", tls_ca="ca.pem"))
    assert transport._tls == TlsFiles(folder / "c.pem", folder / "c.key", folder / "ca.pem")
    assert transport_of(config(folder))._tls is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tls_cert": "c.pem"}, r"transport\.tls_cert: it needs transport\.tls_key beside it"),
        ({"tls_key": "c.key"}, r"transport\.tls_key: it needs transport\.tls_cert beside it"),
        ({"tls_ca": "ca.pem"}, r"transport\.tls_ca: it needs transport\.tls_cert and tls_key"),
        ({"tls_cert": "no", "tls_key": "c.key"}, r"tls_cert: .*no' is no file that can be read"),
        ({"tls_cert": "c.pem", "tls_key": "no"}, r"tls_key: .*no' is no file that can be read"),
        ({"tls_cert": "c.pem", "tls_key": "c.key", "tls_ca": "no"}, r"tls_ca: .*no' is no file"),
        ({"tls_cert": "c.pem", "tls_key": "open.key"}, r"tls_key: others may read"),
        ({"kind": "shm", "tls_cert": "c.pem", "tls_key": "c.key"}, r"'shm' has no TLS"),
    ],
)
def test_what_would_be_no_tls_is_refused_by_its_key(folder, keys, said):
    with pytest.raises(ConfigError, match=said):
        transport_of(config(folder, **keys))


def test_nixl_is_refused_by_its_key_before_a_role_starts(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(ConfigError, match=r"transport\.kind: transport 'nixl' needs the package"):
        transport_of(config(folder, kind="nixl"))


def test_roles_in_processes_talk_under_tls(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    make = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-days", "2", "-subj", "/CN=role", "-keyout", "c.key", "-out", "c.pem",
    ]  # fmt: skip
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    met = []
    monkeypatch.setattr(TlsStream, "bound_to", lambda self: met.append(self) or self._bound)
    tls = {f"transport__tls_{k}": str(tmp_path / f) for k, f in
           {"cert": "c.pem", "key": "c.key", "ca": "c.pem"}.items()}  # fmt: skip
    with load(DIGITS, runtime__processes="per-role", transport__kind="tcp", **tls) as engine:
        done = engine.generate_all([Request("which digit is this ?", SamplingParams(max_tokens=2))])
    assert len(done[0].token_ids) == 2
    assert len(met) == 2  # the front's connections to a:0 and f:0
