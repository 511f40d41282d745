"""Hugging Face folders: logits and answers are those of transformers, both ways; anything else is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghostvis_model import hf_weights
from ghostvis_model.__main__ import main
from ghostvis_model.chat import render_for_completion
from ghostvis_model.config import ConnectorConfig, VLMConfig, get_config, get_vlm_config, qwen25_config, with_vision
from ghostvis_model.encoders import named_encoder
from ghostvis_model.hf_encoding import HuggingFaceEncoding
from ghostvis_model.hf_weights import HuggingFaceError, export_qwen, load_qwen
from ghostvis_model.kv_cache import KVCache
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_model.vlm import GhostVis
from ghostvis_model.weights import CheckpointError

IDS = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))


def small(heads, kv_heads, tied, layers=3):
    """A Qwen2 of transformers with random weights throughout: fresh biases of zero would hide a missing one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=500,
        hidden_size=32 * heads,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(heads)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 1 else 0.15, generator=generator)
    return theirs


def ours_without_transformers():
    """A qwen25 model with random weights throughout."""
    model = GhostVis(VLMConfig(qwen25_config("tiny"))).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 1 else 0.08, generator=generator)
    return model


@torch.inference_mode()
def greedy(model, ids, count):
    """Greedy continuation on the key/value cache."""
    cache = KVCache(model.config.text, 1, ids.shape[1] + count, "cpu", torch.float32)
    out, new = [], ids
    for _ in range(count):
        hidden = model.decoder(model.decoder.embed_tokens(new), cache=cache)
        cache.lengths += new.shape[1]
        new = model.decoder.logits(hidden[:, -1:]).argmax(-1)
        out.append(int(new))
    return out


@pytest.mark.parametrize("heads, kv_heads, tied", [(6, 1, True), (7, 1, False), (14, 2, True)])
def test_a_folder_of_transformers_gives_equal_logits_and_equal_greedy_text(heads, kv_heads, tied, tmp_path):
    theirs = small(heads, kv_heads, tied)
    theirs.save_pretrained(tmp_path)
    ours = GhostVis.from_pretrained(tmp_path, device="cpu")
    assert ours.config.text.family == "qwen25"
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=0, atol=1e-5)
        expected = theirs.generate(IDS[:1], max_new_tokens=30, do_sample=False)[0, IDS.shape[1] :].tolist()
    assert greedy(ours, IDS[:1], 30) == expected


def test_shards_are_read_by_their_index_and_a_lost_one_is_named(tmp_path):
    theirs = small(6, 1, True)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    with torch.inference_mode():
        torch.testing.assert_close(load_qwen(tmp_path).eval()(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-4)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        load_qwen(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [1 << 20, 1 << 40])
def test_an_exported_folder_is_loaded_by_transformers_with_equal_logits(tied, shard_bytes, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", shard_bytes)
    model = GhostVis(VLMConfig(replace(qwen25_config("tiny"), tied_head=tied))).eval()
    model.load_state_dict({**model.state_dict(), **ours_without_transformers().state_dict()})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export_qwen(model, tmp_path), dtype="auto")
    assert theirs.dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-5, atol=1e-5)


def test_export_and_import_give_the_same_model_bit_for_bit_in_its_own_dtype(tmp_path):
    model = ours_without_transformers().to(torch.bfloat16)
    again = load_qwen(export_qwen(model, tmp_path))
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert again.decoder.embed_tokens.weight.dtype == torch.bfloat16
    assert again.decoder.lm_head.weight is again.decoder.embed_tokens.weight


def test_a_tied_folder_that_holds_the_head_twice_is_read(tmp_path):
    model = ours_without_transformers()
    export_qwen(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert torch.equal(load_qwen(tmp_path)(IDS), model(IDS))


def test_a_weight_that_is_missing_or_unknown_is_listed(tmp_path):
    export_qwen(ours_without_transformers(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.q_norm.weight"] = state.pop("model.layers.1.self_attn.q_proj.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing\s+decoder\.layers\.1\.q_proj\.bias") as error:
        load_qwen(tmp_path)
    assert "decoder.layers.0.self_attn.q_norm.weight" in str(error.value)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4}}, "rope_type 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"num_key_value_heads": None}, "num_key_value_heads|lacks"),
    ],
)
def test_a_feature_that_we_do_not_have_is_refused_by_name(change, named, tmp_path):
    export_qwen(ours_without_transformers(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {name: value for name, value in {**config, **change}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HuggingFaceError, match=named):
        load_qwen(tmp_path)


def test_the_config_of_an_older_transformers_is_read(tmp_path):
    model = ours_without_transformers()
    export_qwen(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for newer in ("rope_parameters", "head_dim", "dtype"):
        del config[newer]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    assert load_qwen(tmp_path).config == model.config


def bytes_alone():
    """A ChatML tokenizer of single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": 256 + i, "content": name, **flags} for i, name in enumerate(names)]
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": []}
    return Tokenizer(HuggingFaceEncoding({"added_tokens": added, "pre_tokenizer": split, "model": model}))


def test_a_folder_is_imported_chats_and_is_exported_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GHOSTVIS_HOME", str(tmp_path / "home"))
    model = ours_without_transformers()
    model.tokenizer = bytes_alone()
    export_qwen(model, tmp_path / "hf")
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many <|im_end|>?"}]
    expected = GhostVis.from_pretrained(tmp_path / "hf", device="cpu").chat(question, max_tokens=8)
    assert main(["import", str(tmp_path / "hf"), "--tag", "q", "--kind", "sft"]) == 0
    run = tmp_path / "home" / "sft_checkpoints" / "q"
    assert GhostVis.from_pretrained(run, device="cpu").chat(question, max_tokens=8) == expected
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    assert str(tmp_path / "again") in capsys.readouterr().out
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    ends = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert ends == {"bos_token_id": 256, "eos_token_id": 258}


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path):
    model = GhostVis(VLMConfig(qwen25_config("tiny", vocab_size=258)))
    model.tokenizer = bytes_alone()
    with pytest.raises(HuggingFaceError, match="260 ids, the model rows for 258"):
        load_qwen(export_qwen(model, tmp_path))


def test_an_answer_ends_with_the_turn_and_never_holds_an_image():
    model = ours_without_transformers()
    model.tokenizer = bytes_alone()
    with torch.no_grad():  # the head is the embedding: one direction for all tokens, the image's longest
        model.decoder.embed_tokens.weight[:] = model.decoder.embed_tokens.weight[0].sign() * 0.1
        model.decoder.embed_tokens.weight[model.tokenizer.special("<|im_end|>")] *= 2
        model.decoder.embed_tokens.weight[model.tokenizer.image] *= 3
        ids = torch.tensor([model.tokenizer.encode("Hm?")])
        if model(ids)[0, -1].argmax() != model.tokenizer.image:
            model.decoder.norm.neg_()
        assert model(ids)[0, -1].argmax() == model.tokenizer.image
    assert model.chat("Hm?", max_tokens=8) == ""


def test_a_qwen_with_eyes_reads_its_picture():
    text = qwen25_config("tiny")
    config = with_vision(VLMConfig(text), named_encoder("tiny"), ConnectorConfig("perceiver", 9))
    model = GhostVis(config).eval()
    model.tokenizer = bytes_alone()
    messages = [{"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "What?"}]}]
    rendered = render_for_completion(messages, model.tokenizer, config.tokens_per_image)
    index = rendered.image_starts[0] + torch.arange(9)
    assert all(rendered.ids[i] == model.tokenizer.image for i in index.tolist())
    black, white = (
        model(
            torch.tensor([rendered.ids]), images=torch.full((1, 3, 48, 48), value, dtype=torch.uint8), image_index=index
        )
        for value in (0, 255)
    )
    assert (black - white).abs().max() > 1e-6


def test_a_pt_file_needs_its_tokenizer(tmp_path, capsys):
    assert main(["import", "model_035900.pt", "--tag", "d32"]) == 1
    assert "--tokenizer" in capsys.readouterr().err


def test_a_ghost_is_never_exported_as_qwen(tmp_path):
    with pytest.raises(HuggingFaceError, match="QK-norm, a soft-cap"):
        export_qwen(GhostVis(VLMConfig(get_config(2, 300))), tmp_path)
    with pytest.raises(HuggingFaceError, match="image encoder"):
        export_qwen(GhostVis(get_vlm_config(2, 300, encoder="tiny", tokens_per_image=9)), tmp_path)


def test_a_folder_of_pickles_is_refused(tmp_path):
    export_qwen(ours_without_transformers(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles"):
        GhostVis.from_pretrained(tmp_path)


def test_a_damaged_index_or_config_is_named(tmp_path):
    folder = export_qwen(ours_without_transformers(), tmp_path)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load_qwen(folder)
    data = json.loads((folder / "config.json").read_text())
    without = [{k: v for k, v in data.items() if k != name} for name in ("model_type", "num_attention_heads")]
    for wrong in ([data], *without, {**data, "num_attention_heads": 0, "head_dim": None}):
        (folder / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(HuggingFaceError):
            load_qwen(folder)
