"""One safetensors file: what its header may not say, beyond what the library refuses."""

import pytest

from step3_hetero.errors import CheckpointError
from step3_hetero.model.safetensors_file import Shard


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    entry = b'"x":{"dtype":"%b","shape":[%d],"data_offsets":[0,4]}'
    header = b"{%b,%b}" % (entry % (b"F32", 1), entry % (b"BF16", 2))
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"damaged or cut short .*'x' stands there twice"):
        Shard(path)
