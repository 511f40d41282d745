"""Old `.pt` files: each layout becomes a model that computes what the old code computed, and nothing in them is run."""

import pytest
import torch
import torch.nn.functional as F

import ghostvis_bpe
from ghostvis_model import checkpoint
from ghostvis_model.chat import SPECIAL_TOKENS
from ghostvis_model.old_lineage import import_old
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_model.weights import CheckpointError

TEXTS = ["What colour is the circle? red", "How many squares are there? two"] * 4
OLD_TOKENIZER = Tokenizer(ghostvis_bpe.train(TEXTS, 300, special_tokens=SPECIAL_TOKENS[:9]))
VOCAB, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, DEPTH = OLD_TOKENIZER.vocab_size, 128, 160, 2, 1, 64, 2
LAYOUTS = {
    "ReLU^2": {},
    "SwiGLU, biases, compiled": {"gate": "c_gate", "biases": True, "prefix": "_orig_mod."},
    "SwiGLU of w1 w2 w3, data-parallel and compiled": {"gate": "w1", "prefix": "module._orig_mod."},
    "ReLU^2, biases of queries alone, data-parallel": {"biases": "c_q", "prefix": "module."},
}


def old_state(gate=None, biases=False, prefix="", vocab=VOCAB, seed=0):
    """A random state dict as the old code saved it."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape, std=0.1):
        return torch.randn(*shape, generator=generator) * std

    names = {None: (None, "c_fc", "c_proj"), "c_gate": ("c_gate", "c_fc", "c_proj"), "w1": ("w1", "w3", "w2")}[gate]
    state = {"transformer.wte.weight": tensor(vocab, WIDTH, std=1).bfloat16(), "lm_head.weight": tensor(vocab, WIDTH)}
    for n in range(DEPTH):
        shapes = {
            "attn.c_q": (HEADS * HEAD_DIM, WIDTH),
            "attn.c_k": (KV_HEADS * HEAD_DIM, WIDTH),
            "attn.c_v": (KV_HEADS * HEAD_DIM, WIDTH),
            "attn.c_proj": (WIDTH, HEADS * HEAD_DIM),
            f"mlp.{names[1]}": (HIDDEN, WIDTH),
            f"mlp.{names[2]}": (WIDTH, HIDDEN),
        }
        if names[0]:
            shapes[f"mlp.{names[0]}"] = (HIDDEN, WIDTH)
        for name, shape in shapes.items():
            state[f"transformer.h.{n}.{name}.weight"] = tensor(*shape)
            if biases is True or (biases and name.endswith(biases)):
                state[f"transformer.h.{n}.{name}.bias"] = tensor(shape[0])
    return {f"{prefix}{name}": value for name, value in state.items()}, names


def reference(state, names, ids):
    """The old forward pass, written out: its rotation turns the other way, its norm comes after it."""
    state = {name.split("_orig_mod.")[-1].removeprefix("module."): value.float() for name, value in state.items()}

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x):
        return F.rms_norm(x, (x.shape[-1],))

    tokens = len(ids)
    angle = torch.outer(torch.arange(tokens).float(), 10_000 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)

    x = norm(state["transformer.wte.weight"][ids])
    for n in range(DEPTH):
        h = norm(x)
        q, k, v = (linear(h, f"transformer.h.{n}.attn.{c}").view(tokens, -1, HEAD_DIM) for c in ("c_q", "c_k", "c_v"))
        q, k = norm(turn(q)), norm(turn(k))
        k, v = k.repeat_interleave(HEADS // KV_HEADS, 1), v.repeat_interleave(HEADS // KV_HEADS, 1)
        y = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True)
        x = x + linear(y.transpose(0, 1).flatten(1), f"transformer.h.{n}.attn.c_proj")
        h = norm(x)
        up = linear(h, f"transformer.h.{n}.mlp.{names[1]}")
        hidden = F.silu(linear(h, f"transformer.h.{n}.mlp.{names[0]}")) * up if names[0] else F.relu(up).square()
        x = x + linear(hidden, f"transformer.h.{n}.mlp.{names[2]}")
    logits = norm(x) @ state["lm_head.weight"].T
    return 15 * torch.tanh(logits / 15)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_a_layout_of_the_old_lineage_computes_what_the_old_code_did(layout, tmp_path):
    state, names = old_state(**LAYOUTS[layout])
    torch.save(state, tmp_path / "model_035900.pt")
    model = import_old(tmp_path / "model_035900.pt", OLD_TOKENIZER).eval()
    ids = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(1))
    expected = reference(state, names, ids)
    torch.testing.assert_close(model(ids[None])[0, :, :VOCAB], expected, rtol=1e-5, atol=2e-5)
    text = model.config.text
    assert (text.num_heads, text.num_kv_heads, text.head_dim, text.intermediate_size) == (2, 1, 64, HIDDEN)
    assert text.mlp == ("swiglu" if names[0] else "relu2")


def test_the_image_token_comes_behind_the_nine_old_ones_and_no_row_moves(tmp_path):
    state, _ = old_state()
    torch.save(state, tmp_path / "m.pt")
    model = import_old(tmp_path / "m.pt", OLD_TOKENIZER)
    assert list(model.tokenizer.special_tokens) == list(SPECIAL_TOKENS[:10])
    assert model.tokenizer.image == VOCAB
    assert model.config.text.vocab_size == VOCAB + 1
    assert torch.equal(model.decoder.lm_head.weight[:VOCAB], state["lm_head.weight"])
    torch.testing.assert_close(model.decoder.lm_head.weight[VOCAB], state["lm_head.weight"].mean(0))
    assert model.chat("What colour?", max_tokens=3) is not None


def test_a_padded_vocabulary_has_its_row_already(tmp_path):
    torch.save(old_state(vocab=VOCAB + 20)[0], tmp_path / "m.pt")
    model = import_old(tmp_path / "m.pt", OLD_TOKENIZER)
    assert (model.tokenizer.image, model.config.text.vocab_size) == (VOCAB, VOCAB + 20)


def test_an_imported_model_is_saved_and_loaded_as_one_of_ours(tmp_path):
    torch.save(old_state()[0], tmp_path / "m.pt")
    model = import_old(tmp_path / "m.pt", OLD_TOKENIZER)
    folder = checkpoint.save(tmp_path / "run", 0, model, model.tokenizer, {"config": model.config.to_dict()})
    again = checkpoint.load(folder).model
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids), model(ids))


def test_another_tokenizer_is_refused_with_the_way_to_make_the_right_one(tmp_path):
    torch.save(old_state()[0], tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="from_tiktoken"):
        import_old(tmp_path / "m.pt", Tokenizer(ghostvis_bpe.train(TEXTS, 280)))
    larger = OLD_TOKENIZER.with_special_tokens(["<|more|>"])
    with pytest.raises(CheckpointError, match=f"at most {VOCAB} ids"):
        import_old(tmp_path / "m.pt", larger)


def test_missing_and_unknown_tensors_are_listed(tmp_path):
    state, _ = old_state()
    state["transformer.h.1.attn.ve_gate.weight"] = state.pop("transformer.h.1.attn.c_v.weight")
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"missing\s+transformer\.h\.1\.attn\.c_v\.weight") as error:
        import_old(tmp_path / "m.pt")
    assert "ve_gate" in str(error.value)
    torch.save({"a": torch.zeros(2)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of the old lineage"):
        import_old(tmp_path / "m.pt")


def test_heads_of_another_size_have_to_be_told(tmp_path):
    torch.save(old_state()[0], tmp_path / "m.pt")
    assert import_old(tmp_path / "m.pt", head_dim=32).config.text.num_heads == 4
    with pytest.raises(CheckpointError, match="pass head_dim"):
        import_old(tmp_path / "m.pt", head_dim=48)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"transformer.wte.weight": print}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="never run") as refused:
        import_old(tmp_path / "evil.pt")
    assert "weights_only" not in str(refused.value)  # torch's own words say first how to run it after all
    for cut in (b"PK\x03\x04 cut", b"abc", b"\x80\x02}q\x00(X\x05\x00", b""):
        (tmp_path / "cut.pt").write_bytes(cut)
        with pytest.raises(CheckpointError, match="broke off"):
            import_old(tmp_path / "cut.pt")


def test_the_way_to_make_the_old_tokenizer_in_our_format_makes_it(tmp_path):
    old = OLD_TOKENIZER.encoding  # ranks, pattern and special tokens are what a tiktoken encoding holds
    ghostvis_bpe.from_tiktoken(old.ranks, old.pattern, old.special_tokens).save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).hash == OLD_TOKENIZER.hash
