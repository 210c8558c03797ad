"""The key comes from a file or the environment, and one that is no key is refused."""

import pytest

from step3_hetero.afd.key import VARIABLE, shared_key
from step3_hetero.config import Config
from step3_hetero.errors import ConfigError


def config(folder, key_file="key"):
    transport = {"kind": "tcp", **({"key_file": key_file} if key_file else {})}
    values = {"version": 1, "model": "step3", "transport": transport,
              "roles": {"a": {"stages": ["ffn"], "backend": "cpu"}}}  # fmt: skip
    return Config.from_dict(values, folder)


@pytest.fixture
def key_file(tmp_path):
    def write(content, mode=0o600):
        (tmp_path / "key").write_bytes(content)
        (tmp_path / "key").chmod(mode)
        return tmp_path

    return write


def test_the_file_is_read_and_wins_over_the_environment(key_file, monkeypatch):
    monkeypatch.setenv(VARIABLE, "e" * 20)
    assert shared_key(config(key_file(b"k" * 32 + b"\n"))) == b"k" * 32
    assert shared_key(config(key_file(b""), None)) == b"e" * 20
    monkeypatch.delenv(VARIABLE)
    assert shared_key(config(key_file(b""), None)) is None


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (b"short", 0o600, "holds a key of 5 bytes; allowed: 16 to 4096"),
        (b"k" * 5000, 0o600, "holds a key of 4097 bytes"),
        (b"k" * 32, 0o644, "others may read"),
    ],
)
def test_what_is_no_key_is_refused(key_file, content, mode, said):
    with pytest.raises(ConfigError, match=said):
        shared_key(config(key_file(content, mode)))


def test_a_missing_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        shared_key(config(tmp_path))
