"""config.json: every spelling seen in published files is read, everything else is refused."""

import json
import re
from dataclasses import replace

import pytest

from step3_hetero.errors import ConfigError
from step3_hetero.model.config import FAMILIES, ModelConfig, step3
from step3_hetero.model.json_section import key_lines
from step3_hetero.model.layout import canonical, is_fp8_linear, parameter_count, tensor_shapes

TEXT = {
    "architectures": ["Step3TextForCausalLM"],
    "model_type": "step3_text",
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_attention_groups": 1,
    "head_dim": 16,
    "share_q_dim": 32,
    "moe_layers_enum": "1,2",
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_intermediate_size": 32,
    "share_expert_dim": 40,
    "norm_expert_weight": False,
    "vocab_size": 128,
    "max_position_embedding": 512,
    "rope_theta": 500000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
VISION = {
    "model_type": "step3_vision_encoder",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "output_hidden_size": 24,
    "hidden_act": "quick_gelu",
}
WHOLE = {
    "architectures": ["Step3VLForConditionalGeneration"],
    "model_type": "step3_vl",
    "image_token_id": 127,
    "understand_projector_stride": 2,
    "text_config": {k: v for k, v in TEXT.items() if k != "architectures"},
    "vision_config": VISION,
}


@pytest.fixture
def read(tmp_path):
    """Read a config after changes; a value of None takes the key out."""

    def read(base=TEXT, **changes):
        config = {k: v for k, v in {**base, **changes}.items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        return ModelConfig.read(tmp_path)

    return read


@pytest.fixture
def refusal(read, tmp_path):
    """Return the message of a refused config, without the folder."""

    def refusal(base=TEXT, **changes):
        with pytest.raises(ConfigError) as caught:
            read(base, **changes)
        return str(caught.value).removeprefix(f"{tmp_path}/")

    return refusal


def text(**changes):
    return {**WHOLE, "text_config": {**WHOLE["text_config"], **changes}}


def vision(**changes):
    return {**WHOLE, "vision_config": {**VISION, **changes}}


def test_text_model_is_read_from_the_top_level(read, tmp_path):
    config = read()
    assert config.name == tmp_path.name
    assert (config.vision, config.image_token_id, config.projector_bias) == (None, None, None)
    assert (config.text.hidden_size, config.text.kv_heads, config.text.max_positions) == (
        48,
        1,
        512,
    )
    assert (config.text.rope_theta, config.text.norm_expert_weight) == (500000.0, False)


def test_whole_model_is_read_from_its_sections(read):
    config = read(WHOLE)
    assert config.text == read().text
    assert (config.image_token_id, config.projector_stride) == (127, 2)
    assert config.vision.output_hidden_size == 24


def test_vision_defaults_are_the_releases_not_the_codes(read):
    tower = read(WHOLE).vision
    assert (tower.intermediate_size, tower.layer_norm_eps) == (15360, 1e-6)
    stated = read(vision(intermediate_size=64, layer_norm_eps=1e-5)).vision
    assert (stated.intermediate_size, stated.layer_norm_eps) == (64, 1e-5)


@pytest.mark.parametrize("stated", ["1,2", " 2, 1 ", [1, 2], ["1", "2"]], ids=repr)
def test_moe_layers_are_read_from_a_string_or_a_list(read, stated):
    config = read(moe_layers_enum=stated)
    assert config.text.moe_layers == (1, 2)
    assert [config.text.is_moe(n) for n in range(4)] == [False, True, True, False]


def test_without_moe_layers_every_layer_but_the_first_has_experts(read):
    assert read(moe_layers_enum=None).text.moe_layers == (1, 2, 3)


@pytest.mark.parametrize("stated", ["", []], ids=repr)
def test_an_empty_enumeration_means_no_experts(read, stated):
    assert read(moe_layers_enum=stated).text.moe_layers == ()


@pytest.mark.parametrize(
    "key", ["max_position_embedding", "max_position_embeddings", "max_seq_len"]
)
def test_positions_are_read_under_any_of_their_names(read, key):
    changes = {"max_position_embedding": None} | {key: 777}
    assert read(**changes).text.max_positions == 777


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_read_under_either_name_and_at_either_level(read, key):
    assert read(**{"torch_dtype": None, key: "float32"}).dtype == "float32"
    assert read({**WHOLE, "text_config": TEXT | {"torch_dtype": None}}).dtype == "bfloat16"
    assert read({**WHOLE, "text_config": TEXT | {"torch_dtype": None}, key: "float32"}).dtype == (
        "float32"
    )


@pytest.mark.parametrize(("stated", "ids"), [(1, (1,)), ([1, 5], (1, 5)), (None, ())])
def test_eos_is_one_id_a_list_or_missing(read, stated, ids):
    assert read(eos_token_id=stated).text.eos_token_ids == ids


def test_token_ids_are_found_at_the_top_of_a_whole_model(read):
    config = read(WHOLE, bos_token_id=0, eos_token_id=[1, 2])
    assert (config.text.bos_token_id, config.text.eos_token_ids) == (0, (1, 2))


def test_rope_theta_is_found_in_rope_parameters(read):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    assert read(rope_theta=None, rope_parameters=rope).text.rope_theta == 10000.0


def test_block_fp8_is_recognised_at_either_level(read):
    q = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    assert not read().fp8_blocks
    assert read(quantization_config=q).fp8_blocks
    assert read(text(quantization_config=q)).fp8_blocks


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"hidden_size": "48"}, "hidden_size", "'48'"),
        ({"hidden_size": 48.5}, "hidden_size", "48.5"),
        ({"hidden_size": True}, "hidden_size", "True"),
        ({"hidden_size": -48}, "hidden_size", "-48"),
        ({"vocab_size": 0}, "vocab_size", "from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers", "to 4096, found 1000000000"),
        (
            {"num_attention_groups": 3},
            "num_attention_groups",
            "does not divide num_attention_heads",
        ),
        ({"head_dim": 15}, "head_dim", "15 is no multiple of 2"),
        ({"moe_top_k": 9}, "moe_top_k", "from 1 to 8, found 9"),
        ({"moe_layers_enum": "1,4"}, "moe_layers_enum", "layer 4 does not exist; layers: 0 to 3"),
        ({"moe_layers_enum": [-1]}, "moe_layers_enum", "layer -1 does not exist"),
        ({"moe_layers_enum": "1;2"}, "moe_layers_enum", "found '1;2'"),
        ({"moe_layers_enum": [1, True]}, "moe_layers_enum", "True"),
        ({"moe_layers_enum": 7}, "moe_layers_enum", "found 7"),
        ({"moe_layers_enum": {"1": 2}}, "moe_layers_enum", "found {'1': 2}"),
        ({"moe_layers_enum": "1,1"}, "moe_layers_enum", "named twice"),
        ({"norm_expert_weight": 0}, "norm_expert_weight", "expected true or false, found 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps", "above 0, found 0"),
        ({"rope_theta": float("inf")}, "rope_theta", "above 0, found inf"),
        ({"rope_theta": float("nan")}, "rope_theta", "above 0, found nan"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling", "{'factor': 2}: scaled RoPE is not"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", "True is refused"),
        ({"hidden_act": "gelu"}, "hidden_act", "'gelu' is refused"),
        (
            {"torch_dtype": "float16"},
            "torch_dtype",
            "'float16' is not supported; allowed: bfloat16",
        ),
        ({"torch_dtype": ["x"]}, "torch_dtype", "['x'] is not supported"),
        ({"bos_token_id": 128}, "bos_token_id", "from 0 to 127, found 128"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id", "found '2'"),
        ({"eos_token_id": -1}, "eos_token_id", "found -1"),
        ({"model_type": "llama"}, "model_type", "'llama' is not Step-3; supported: step3_text"),
        ({"model_type": ["a"]}, "model_type", "['a'] is not Step-3"),
        ({"model_type": "step3_vl"}, "architectures", "does not belong to 'step3_vl'"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures", "'LlamaForCausalLM' is not"),
        ({"architectures": "Step3TextForCausalLM"}, "architectures", "a list of one name"),
        ({"quantization_config": 8}, "quantization_config", "expected an object, found 8"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_at_its_line(refusal, tmp_path, changes, key, said):
    message = refusal(**changes)
    lines = (tmp_path / "config.json").read_text().splitlines()
    line = next(n for n, written in enumerate(lines, 1) if f'"{key}":' in written)
    assert message.startswith(f"config.json:{line}: {key}: ")
    assert said in message


@pytest.mark.parametrize(
    ("base", "key", "said"),
    [
        (vision(hidden_size=30), "vision_config.hidden_size", "30 is no multiple of 4"),
        (vision(image_size=30), "vision_config.image_size", "30 is no multiple of 4"),
        (vision(image_size=4), "vision_config.image_size", "needs two patches"),
        (vision(hidden_act="gelu"), "vision_config.hidden_act", "'gelu' is refused"),
        (vision(model_type="clip"), "vision_config.model_type", "'clip' is refused"),
        (vision(layer_norm_eps=-1e-6), "vision_config.layer_norm_eps", "found -1e-06"),
        (text(hidden_size="x"), "text_config.hidden_size", "found 'x'"),
        (text(model_type="llama"), "text_config.model_type", "'llama' is refused"),
        (text(dtype="float32") | {"dtype": "bfloat16"}, "text_config.dtype", "contradicts"),
        (WHOLE | {"text_config": [1]}, "text_config", "expected an object, found [1]"),
        (WHOLE | {"image_token_id": 128}, "image_token_id", "from 0 to 127, found 128"),
        (WHOLE | {"projector_bias": "no"}, "projector_bias", "found 'no'"),
        (WHOLE | {"tie_word_embeddings": True}, "tie_word_embeddings", "True is refused"),
        (
            text(rope_parameters={"rope_type": "yarn"}),
            "text_config.rope_parameters.rope_type",
            "'yarn' is refused",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_value_in_a_section_is_refused_with_its_path(refusal, base, key, said):
    message = refusal(base)
    assert re.match(rf"config\.json:\d+: {re.escape(key)}: ", message)
    assert said in message


def test_the_line_is_that_of_the_right_section(refusal, tmp_path):
    line = int(refusal(vision(hidden_size=-1)).split(":")[1])
    written = (tmp_path / "config.json").read_text().splitlines()
    assert '"hidden_size": -1' in written[line - 1]


@pytest.mark.parametrize("key", ["hidden_size", "moe_top_k", "rms_norm_eps", "rope_theta"])
def test_a_missing_key_is_refused_by_name(refusal, key):
    assert refusal(**{key: None}).startswith(f"config.json:1: {key}: missing; expected ")


def test_a_missing_key_of_a_section_is_refused_at_the_sections_line(refusal, tmp_path):
    base = vision()
    del base["vision_config"]["patch_size"]
    message = refusal(base)
    lines = (tmp_path / "config.json").read_text().splitlines()
    line = 1 + next(n for n, written in enumerate(lines) if '"vision_config"' in written)
    assert message.startswith(f"config.json:{line}: vision_config.patch_size: missing")


def test_a_missing_section_is_refused(refusal):
    assert "text_config: missing; expected an object" in refusal(WHOLE, text_config=None)


def test_a_config_without_any_kind_is_refused(refusal):
    assert "model_type: missing; supported: step3_text" in refusal(
        model_type=None, architectures=None
    )


@pytest.mark.parametrize("missing", ["model_type", "architectures"])
def test_one_of_model_type_and_architecture_is_enough(read, missing):
    assert read(**{missing: None}).text.hidden_size == 48


@pytest.mark.parametrize(
    ("q", "key"),
    [
        ({"quant_method": "awq", "weight_block_size": [128, 128]}, "quant_method"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size"),
        ({"quant_method": "fp8"}, "weight_block_size"),
        ({"weight_block_size": [128, 128]}, "quant_method"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, "fmt"),
    ],
    ids=str,
)
def test_another_quantisation_is_refused(refusal, q, key):
    assert f": quantization_config.{key}: " in refusal(quantization_config=q)


def test_a_syntax_error_is_refused_at_its_line(tmp_path):
    (tmp_path / "config.json").write_text('{\n "a": 1,\n "b": }\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json:3: "):
        ModelConfig.read(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read: No such file"):
        ModelConfig.read(tmp_path)


def test_the_released_model_has_the_published_size():
    config = FAMILIES["step3"]()
    assert config.name == "step3"
    assert parameter_count(config) == 320_969_912_832
    assert parameter_count(config, "model.layers.4.self_attn.") == 169_347_072
    assert parameter_count(config, "model.layers.60.mlp.") == 396_361_728
    assert parameter_count(config, "vi") == pytest.approx(4.675e9, rel=1e-4)
    moe = ("model.layers.4.moe.", "model.layers.4.share_expert.")
    assert sum(parameter_count(config, prefix) for prefix in moe) == 5_395_267_584


def test_the_released_layout_has_the_published_shapes():
    shapes = tensor_shapes(step3())
    assert shapes["model.layers.5.moe.gate_proj.weight"] == (48, 5120, 7168)
    assert shapes["model.layers.5.self_attn.o_proj.weight"] == (7168, 16384)
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (2705, 1792)
    assert shapes["vit_downsampler2.weight"] == (8192, 4096, 3, 3)
    dense = [n for n in range(61) if f"model.layers.{n}.mlp.up_proj.weight" in shapes]
    assert dense == [0, 1, 2, 3, 60]


def test_the_projectors_bias_is_in_the_layout_only_when_decided():
    bias = "vit_large_projector.bias"
    assert bias not in tensor_shapes(step3())
    assert tensor_shapes(replace(step3(), projector_bias=True))[bias] == (7168,)


def test_fp8_is_for_the_language_models_linears_alone():
    fp8 = {n for n in tensor_shapes(step3()) if is_fp8_linear(n)}
    assert len(fp8) == 61 * 5 + 5 * 3 + 56 * 6
    wrong = ("norm", "moe.gate.", "embed", "lm_head", "vi")
    assert not [n for n in fp8 if any(part in n for part in wrong)]


def test_both_spellings_of_a_name_are_one():
    pairs = {
        "model.language_model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "model.vision_model.embeddings.class_embedding": "vision_model.embeddings.class_embedding",
        "model.vit_downsampler.bias": "vit_downsampler.bias",
        "lm_head.weight": "lm_head.weight",
    }
    assert {name: canonical(name) for name in pairs} == pairs
    assert all(canonical(name) == name for name in tensor_shapes(step3()))


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_whole_number_that_no_float_holds_is_refused(read, key):
    with pytest.raises(ConfigError, match=rf"config.json:\d+: .*{key}: expected a number above 0"):
        read(TEXT, **{key: 10**400})


def test_a_key_that_stands_twice_is_refused_by_name(tmp_path):
    text = json.dumps(TEXT)
    (tmp_path / "config.json").write_text(text[:-1] + ', "hidden_size": 96}')
    with pytest.raises(ConfigError, match=r"config.json: .*'hidden_size' stands there twice"):
        ModelConfig.read(tmp_path)


def test_the_line_of_a_key_is_found_in_one_pass_over_a_large_file():
    keys = 40_000
    text = "{" + ",\n".join(f'"k{n}": 1' for n in range(keys)) + "}"
    counted = _Counted(text)
    assert dict(key_lines(counted))[(f"k{keys - 1}",)] == keys
    assert counted.characters <= len(text)


class _Counted(str):
    """Text that knows over how many characters lines were counted."""

    characters = 0

    def count(self, sub, start=0, end=None):
        self.characters += (len(self) if end is None else end) - start
        return super().count(sub, start, end)
