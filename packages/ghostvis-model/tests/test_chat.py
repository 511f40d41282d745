"""What chat rendering promises: the loss mask, the image slots, truncation, and errors for a person.

The tokenizer here has one id per byte, so that the expected tables can be read.
"""

import re
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostvis_model.chat import (
    SPECIAL_TOKENS,
    SYSTEM_TOKENS,
    Rendered,
    RenderError,
    check_image_count,
    render,
    render_for_completion,
    show,
)


@dataclass(frozen=True)
class Bytes:
    """A tokenizer of one id per byte, then the special tokens."""

    names: tuple[str, ...] = SPECIAL_TOKENS
    special_tokens: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_tokens", {name: 256 + i for i, name in enumerate(self.names)})

    def special(self, name: str) -> int:
        return self.special_tokens[name]

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids, keep_special: bool = False) -> str:
        spelled = [bytes([i]) if i < 256 else self.names[i - 256].encode() * keep_special for i in ids]
        return b"".join(spelled).decode("utf-8", "replace")


NEW = Bytes()
OLD = Bytes(tuple(name for name in SPECIAL_TOKENS if name not in SYSTEM_TOKENS))


def image(reference):
    return {"type": "image", "image": reference}


def text(content):
    return {"type": "text", "text": content}


def python(code):
    return {"type": "python", "text": code}


def output(result):
    return {"type": "python_output", "text": result}


def user(*content):
    return {
        "role": "user",
        "content": content[0] if len(content) == 1 and isinstance(content[0], str) else list(content),
    }


def assistant(*content):
    return user(*content) | {"role": "assistant"}


def system(content):
    return {"role": "system", "content": content}


def table(rendered: Rendered, tokenizer: Bytes) -> list[tuple[str, int]]:
    """(token, mask) for each token, with the bytes of a stretch of text joined while their mask is the same."""
    rows: list[tuple[str, int]] = []
    was_text = False
    for token, trained_on in zip(rendered.ids, rendered.mask, strict=True):
        piece, is_text = tokenizer.decode([token], keep_special=True), token < 256
        if is_text and was_text and rows[-1][1] == trained_on:
            rows[-1] = (rows[-1][0] + piece, trained_on)
        else:
            rows.append((piece, trained_on))
        was_text = is_text
    return rows


BOS, IMAGE = ("<|bos|>", 0), ("<|image|>", 0)
U, U_END = ("<|user_start|>", 0), ("<|user_end|>", 0)
A, A_END = ("<|assistant_start|>", 0), ("<|assistant_end|>", 1)
S, S_END = ("<|system_start|>", 0), ("<|system_end|>", 0)
PY, PY_END = ("<|python_start|>", 1), ("<|python_end|>", 1)
OUT, OUT_END = ("<|output_start|>", 0), ("<|output_end|>", 0)

GOLDEN = {
    "a single turn": (NEW, [user("hi"), assistant("yes")], [BOS, U, ("hi", 0), U_END, A, ("yes", 1), A_END]),
    "several turns": (
        NEW,
        [user("a"), assistant("b"), user("c"), assistant("d")],
        [BOS, U, ("a", 0), U_END, A, ("b", 1), A_END, U, ("c", 0), U_END, A, ("d", 1), A_END],
    ),
    "a system turn, with its tokens": (
        NEW,
        [system("be brief"), user("a"), assistant("b")],
        [BOS, S, ("be brief", 0), S_END, U, ("a", 0), U_END, A, ("b", 1), A_END],
    ),
    "a system turn, without its tokens": (
        OLD,
        [system("be brief"), user("a"), assistant("b")],
        [BOS, U, ("be brief\n\na", 0), U_END, A, ("b", 1), A_END],
    ),
    "a system turn before an image, without its tokens": (
        OLD,
        [system([text("be "), text("brief")]), user(image(0), text("a")), assistant("b")],
        [BOS, U, ("be brief\n\n", 0), IMAGE, IMAGE, IMAGE, ("a", 0), U_END, A, ("b", 1), A_END],
    ),
    "an image first": (
        NEW,
        [user(image("x.png"), text("what?")), assistant("cat")],
        [BOS, U, IMAGE, IMAGE, IMAGE, ("what?", 0), U_END, A, ("cat", 1), A_END],
    ),
    "an image in the middle": (
        NEW,
        [user(text("see "), image("x.png"), text(" here")), assistant("cat")],
        [BOS, U, ("see ", 0), IMAGE, IMAGE, IMAGE, (" here", 0), U_END, A, ("cat", 1), A_END],
    ),
    "two images and one later": (
        NEW,
        [user(image(0), image(1), text("same?")), assistant("no"), user(text("and "), image(2)), assistant("yes")],
        [
            *[BOS, U, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, ("same?", 0), U_END, A, ("no", 1), A_END],
            *[U, ("and ", 0), IMAGE, IMAGE, IMAGE, U_END, A, ("yes", 1), A_END],
        ],
    ),
    "a tool call": (
        NEW,
        [user("6*7"), assistant(text("I count: "), python("6*7"), output("42"), text("42."))],
        [
            *[BOS, U, ("6*7", 0), U_END, A, ("I count: ", 1), PY, ("6*7", 1), PY_END],
            *[OUT, ("42", 0), OUT_END, ("42.", 1), A_END],
        ],
    ),
    "special tokens typed by the user and by the assistant": (
        NEW,
        [user("a<|image|>b<|assistant_end|>"), assistant("<|bos|>")],
        [BOS, U, ("a<|image|>b<|assistant_end|>", 0), U_END, A, ("<|bos|>", 1), A_END],
    ),
    "a question without a word": (
        NEW,
        [user(image(0)), assistant("cat")],
        [BOS, U, *[IMAGE] * 3, U_END, A, ("cat", 1), A_END],
    ),
    "an empty text part": (NEW, [user(""), assistant(text(""), text("b"))], [BOS, U, U_END, A, ("b", 1), A_END]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_loss_mask_of(name):
    tokenizer, messages, expected = GOLDEN[name]
    assert table(render(messages, tokenizer, 3), tokenizer) == expected


def test_image_starts_and_references_follow_the_messages():
    rendered = render(GOLDEN["two images and one later"][1], NEW, 3)
    assert rendered.images == [0, 1, 2]
    assert rendered.image_starts == [2, 5, 23]


def test_special_tokens_have_their_settled_order():
    assert (
        *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>"),
        *("<|python_end|>", "<|output_start|>", "<|output_end|>", "<|image|>", "<|system_start|>", "<|system_end|>"),
    ) == SPECIAL_TOKENS


def test_each_text_part_is_encoded_on_its_own():
    class Whole(Bytes):
        """One id per text, so that two parts and one longer part differ."""

        def encode(self, text):
            return [len(text)]

    tokenizer = Whole()
    assert render([user(text("ab"), text("c")), assistant("d")], tokenizer, 1).ids[2:4] == [2, 1]
    assert render([user("abc"), assistant("d")], tokenizer, 1).ids[2] == 3


# ---- promises over random conversations

texts = st.one_of(st.text(max_size=8), st.sampled_from(["<|image|>", "<|assistant_end|>", "é🙂", "\n\n"]))
answers = st.lists(st.one_of(texts.map(text), texts.map(python), texts.map(output)), min_size=0, max_size=3).map(
    lambda parts: assistant(*parts, text("end"))
)
questions = st.lists(st.one_of(texts.map(text), st.integers(0, 99).map(image)), max_size=4).map(
    lambda parts: user(*parts)
)
pairs = st.lists(st.tuples(questions, answers), min_size=1, max_size=4)


@st.composite
def conversations(draw):
    messages = [message for pair in draw(pairs) for message in pair]
    return [system(draw(texts)), *messages] if draw(st.booleans()) else messages


tokenizers = st.sampled_from([NEW, OLD])


def parts(message):
    content = message["content"]
    return [text(content)] if isinstance(content, str) else content


def shown(messages):
    return [part["image"] for message in messages for part in parts(message) if part["type"] == "image"]


@given(conversations(), tokenizers, st.integers(1, 5))
def test_image_slots_hold_exactly_the_image_ids(messages, tokenizer, tokens_per_image):
    rendered = render(messages, tokenizer, tokens_per_image)
    slots = [start + k for start in rendered.image_starts for k in range(tokens_per_image)]
    assert slots == [i for i, token in enumerate(rendered.ids) if token == tokenizer.special("<|image|>")]
    assert rendered.images == shown(messages)
    check_image_count(len(slots), len(rendered.images), tokens_per_image)


@given(conversations(), tokenizers)
def test_the_mask_is_one_exactly_on_what_the_assistant_writes(messages, tokenizer):
    rendered = render(messages, tokenizer, 2)
    trained = [token for token, trained_on in zip(rendered.ids, rendered.mask, strict=True) if trained_on]
    expected = []
    for message in messages:
        if message["role"] != "assistant":
            continue
        for part in parts(message):
            if part["type"] == "text":
                expected += tokenizer.encode(part["text"])
            elif part["type"] == "python":
                ends = tokenizer.special("<|python_start|>"), tokenizer.special("<|python_end|>")
                expected += [ends[0], *tokenizer.encode(part["text"]), ends[1]]
        expected.append(tokenizer.special("<|assistant_end|>"))
    assert trained == expected
    assert set(rendered.mask) == {0, 1}
    assert len(rendered.mask) == len(rendered.ids)


@given(conversations(), tokenizers)
def test_the_text_comes_back_from_the_ids(messages, tokenizer):
    written = [part["text"] for message in messages for part in parts(message) if part["type"] != "image"]
    if messages[0]["role"] == "system" and tokenizer is OLD:
        written.insert(1, "\n\n")
    assert tokenizer.decode(render(messages, tokenizer, 2).ids) == "".join(written)


@given(conversations(), tokenizers, st.integers(1, 4))
def test_a_prompt_is_the_beginning_of_the_conversation_with_its_answer(messages, tokenizer, tokens_per_image):
    whole = render(messages, tokenizer, tokens_per_image)
    prompt = render_for_completion(messages[:-1], tokenizer, tokens_per_image)
    assert prompt.ids == whole.ids[: len(prompt.ids)]
    assert prompt.ids[-1] == tokenizer.special("<|assistant_start|>")
    assert not any(prompt.mask)
    assert len(prompt.mask) == len(prompt.ids)
    assert (prompt.images, prompt.image_starts) == (whole.images, whole.image_starts)


@given(conversations(), tokenizers, st.integers(1, 6), st.integers(1, 120))
def test_truncation_keeps_its_promises(messages, tokenizer, tokens_per_image, max_tokens):
    whole = render(messages, tokenizer, tokens_per_image)
    head = 2 if messages[0]["role"] == "system" else 1
    first = render_for_completion(messages[:head], tokenizer, tokens_per_image)
    pair = render(messages[: head + 1], tokenizer, tokens_per_image)
    if not any(whole.mask[:max_tokens]):  # no supervised token of the first answer fits
        with pytest.raises(RenderError, match=f"the limit is {max_tokens}"):
            render(messages, tokenizer, tokens_per_image, max_tokens=max_tokens)
        return
    cut = render(messages, tokenizer, tokens_per_image, max_tokens=max_tokens)
    assert len(cut.ids) <= max_tokens
    assert cut.ids == whole.ids[: len(cut.ids)]
    assert cut.mask == whole.mask[: len(cut.ids)]
    assert cut.mask[-1] == 1
    assert cut.ids[: len(first.ids)] == first.ids  # the first question is whole
    images = cut.ids.count(tokenizer.special("<|image|>"))
    assert images == len(cut.images) * tokens_per_image  # no run is cut
    assert cut.image_starts == whole.image_starts[: len(cut.images)]
    if cut.answer_cut:
        assert len(pair.ids) > max_tokens
    else:
        kept = messages[: len(messages) - cut.dropped_turns]
        assert cut.ids == render(kept, tokenizer, tokens_per_image).ids
        if cut.dropped_turns:  # and the next pair would not have fitted
            more = messages[: len(kept) + 2]
            assert len(render(more, tokenizer, tokens_per_image).ids) > max_tokens


@settings(max_examples=30)
@given(conversations(), tokenizers)
def test_a_limit_that_fits_changes_nothing(messages, tokenizer):
    whole = render(messages, tokenizer, 2)
    assert render(messages, tokenizer, 2, max_tokens=len(whole.ids)) == whole


def test_a_long_answer_is_cut_to_the_limit_and_its_question_kept():
    rendered = render([user("why?"), assistant("because of it"), user("b"), assistant("c")], NEW, 1, max_tokens=12)
    expected = [BOS, U, ("why?", 0), U_END, A, ("beca", 1)]
    assert table(rendered, NEW) == expected
    assert (rendered.answer_cut, rendered.dropped_turns) == (True, 2)


def test_a_cut_answer_ends_on_a_token_that_is_trained_on():
    messages = [user("x"), assistant(python("1"), output("22222222"), text("ok"))]
    rendered = render(messages, NEW, 1, max_tokens=12)
    assert table(rendered, NEW) == [BOS, U, ("x", 0), U_END, A, PY, ("1", 1), PY_END]


def test_a_first_question_that_leaves_no_room_names_both_numbers():
    with pytest.raises(RenderError) as error:
        render([user(image(0), text("what?")), assistant("cat")], NEW, 64, max_tokens=64, sample_id="sft/chartqa#40213")
    assert str(error.value).splitlines() == [
        "ghostvis: the first question takes 72 tokens, the limit is 64.",
        "  sample   sft/chartqa#40213 (72 tokens, 1 image(s) of 64 tokens among them)",
        "  expected the question whole, then <|assistant_start|> and at least one token of the answer, within 64",
        "  likely   a long document in the question, or more images than the context has room for",
        "  try      ghostvis-data check chartqa --sample 40213",
    ]


def test_a_prompt_over_the_limit_is_refused_and_never_shortened():
    assert render_for_completion([user("abc")], NEW, 1, max_tokens=7).ids[-1] == NEW.special("<|assistant_start|>")
    with pytest.raises(RenderError, match="takes 7 tokens, the limit is 6"):
        render_for_completion([user("abc")], NEW, 1, max_tokens=6)


# ---- errors

BAD = {
    "no list": ({"role": "user", "content": "x"}, "the conversation is a dict"),
    "a string": ("hello", "the conversation is a str"),
    "no messages": ([], "an empty conversation"),
    "a message that is text": ([["user", "x"]], "message 0 is a list"),
    "a message without content": ([{"role": "user"}], "message 0 has the keys 'role'"),
    "a key nobody reads": ([user("x"), assistant("y") | {"tool_calls": []}], "'tool_calls'"),
    "an unknown role": ([{"role": "human", "content": "x"}], "the role 'human'"),
    "a role that is no string": ([{"role": ["user"], "content": "x"}], "the role ['user']"),
    "two user turns": ([user("x"), user("z"), assistant("y")], "messages 0 and 1 are both from the user"),
    "two answers": ([user("x"), assistant("y"), assistant("z")], "messages 1 and 2 are both from the assistant"),
    "an answer first": ([assistant("y")], "message 0 is an answer to nothing"),
    "an answer to the system": ([system("s"), assistant("y")], "message 1 is an answer to nothing"),
    "a late system message": ([user("x"), assistant("y"), system("s")], "message 2 is from the system"),
    "a system message alone": ([system("s")], "zero supervised tokens"),
    "no answer": ([user("x")], "zero supervised tokens"),
    "a last question": ([user("x"), assistant("y"), user("z")], "a last message from the user"),
    "an empty answer": ([user("x"), assistant("")], "message 1, the answer, is empty"),
    "an answer of tool output only": ([user("x"), assistant(output("1"))], "message 1, the answer, is empty"),
    "an image in an answer": ([user("x"), assistant(text("y"), image(0))], "part 1 of message 1 has the type 'image'"),
    "an image in the system turn": ([system([image(0)]), user("x"), assistant("y")], "in a system turn"),
    "a tool call by the user": ([user(python("1")), assistant("y")], "the type 'python' in a user turn"),
    "an unknown part": ([user({"type": "video", "video": 0}), assistant("y")], "the type 'video'"),
    "a part without type": ([user({"text": "x"}), assistant("y")], "part 0 of message 0 is the keys 'text'"),
    "bare text in a list": ([user("x", "z"), assistant("y")], "part 0 of message 0 is a str"),
    "a part with a key nobody reads": ([user(text("x") | {"weight": 2}), assistant("y")], "'weight'"),
    "an image of the OpenAI form": ([user({"type": "image", "image_url": "x"}), assistant("y")], "'image_url'"),
    "text that is a number": ([user(text(3)), assistant("y")], "the text of part 0 of message 0 is a int"),
    "no image": ([user(image(None)), assistant("y")], "the image of part 0 of message 0 is None"),
    "content None": ([{"role": "user", "content": None}], "the content of message 0 is a NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_conversation_is_refused_by_name(name):
    messages, found = BAD[name]
    with pytest.raises(RenderError) as error:
        render(messages, NEW, 2, sample_id="tiny#7")  # ty: ignore[invalid-argument-type]
    head, sample, expected, likely, command = str(error.value).splitlines()
    assert head == "ghostvis: this conversation cannot be rendered."
    assert sample.startswith("  sample   tiny#7 (")
    assert found in sample
    assert re.fullmatch(r"  expected \S.*", expected)
    assert re.fullmatch(r"  likely   \S.*", likely)
    assert command == "  try      ghostvis-data check tiny --sample 7"


def test_an_error_without_a_sample_id_points_to_the_form_of_a_conversation():
    with pytest.raises(
        RenderError, match=r"found    an empty conversation\n(.*\n)*  try      python -m pydoc ghostvis_model.chat"
    ):
        render([], NEW, 2)


@pytest.mark.parametrize(
    "sample_id, command",
    [
        ("00017", "check DATASET --sample 00017"),
        ("sft/chartqa#40213", "check chartqa --sample 40213"),
        ("/data/my set/train#a#b", "check '/data/my set/train' --sample 'a#b'"),
        ("out/train#7", "check out/train --sample 7"),
    ],
)
def test_an_error_gives_the_command_that_shows_the_sample(sample_id, command):
    with pytest.raises(RenderError, match=f"  try      ghostvis-data {command}$"):
        render([], NEW, 2, sample_id=sample_id)


def test_a_prompt_may_hold_an_empty_answer_but_must_end_with_a_question():
    assert render_for_completion([user("x"), assistant(""), user("y")], NEW, 2).ids[-1] == NEW.special(
        "<|assistant_start|>"
    )
    with pytest.raises(RenderError, match="a last message from the assistant"):
        render_for_completion([user("x"), assistant("y")], NEW, 2)


def test_a_model_without_eyes_refuses_an_image():
    assert render([user("x"), assistant("y")], NEW, 0).images == []
    with pytest.raises(RenderError, match="this model has no eyes"):
        render([user(image(0)), assistant("y")], NEW, 0)


@pytest.mark.parametrize("arguments", [{"tokens_per_image": -1}, {"tokens_per_image": 1, "max_tokens": 0}])
def test_impossible_limits_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        render([user("x"), assistant("y")], NEW, **arguments)


def test_a_wrong_image_count_is_the_error_of_the_house():
    with pytest.raises(RenderError) as error:
        check_image_count(128, 3, 64, sample_id="sft/chartqa#40213", expected_by="siglip2_l16_384, perceiver")
    assert str(error.value) == (
        "ghostvis: 128 image placeholders but 192 image features.\n"
        "  sample   sft/chartqa#40213 (2 x <|image|>, 3 files)\n"
        "  expected 64 tokens per image (siglip2_l16_384, perceiver)\n"
        "  likely   the record lists an image that its text never mentions\n"
        "  try      ghostvis-data check chartqa --sample 40213"
    )


@pytest.mark.parametrize(
    "placeholders, images, tokens_per_image, likely",
    [
        (128, 1, 64, "an image that the record does not hold"),
        (100, 2, 64, "an image run was cut"),
        (3, 0, 0, "does not hold"),
    ],
)
def test_a_wrong_image_count_names_its_likely_cause(placeholders, images, tokens_per_image, likely):
    with pytest.raises(RenderError, match=likely):
        check_image_count(placeholders, images, tokens_per_image)


def test_a_right_image_count_passes():
    check_image_count(0, 0, 64)
    check_image_count(128, 2, 64)
    check_image_count(0, 0, 0)


# ---- the view


def test_show_has_a_line_per_stretch_and_one_per_image():
    messages = [user(image(0), image(1), text("é\n\x1b[2J")), assistant("yes")]
    assert show(render(messages, NEW, 4), NEW, colour=False).splitlines() == [
        "23 tokens, 4 trained on, 2 images",
        "position mask  tokens  [ids]",
        "       0    0  <|bos|>  [256]",
        "       1    0  <|user_start|>  [257]",
        "       2    0  <|image|> x 4  [265]",
        "       6    0  <|image|> x 4  [265]",
        r"      10    0  é|\n|\x1b|[|2|J  [195 169 10 27 91 50 74]",
        "      17    0  <|user_end|>  [258]",
        "      18    0  <|assistant_start|>  [259]",
        "      19    1  y|e|s  [121 101 115]",
        "      22    1  <|assistant_end|>  [260]",
    ]


def test_show_paints_trained_tokens_green_and_says_what_was_cut():
    view = show(render([user("a"), assistant("bcd"), user("e"), assistant("f")], NEW, 1, max_tokens=7), NEW)
    assert "\x1b[32mb|c\x1b[0m" in view
    assert "2 turns dropped, answer cut" in view


@settings(max_examples=50)
@given(conversations(), tokenizers)
def test_show_takes_any_conversation_and_lets_no_control_character_through(messages, tokenizer):
    view = show(render(messages, tokenizer, 2), tokenizer, colour=False)
    assert all(line.isprintable() for line in view.split("\n"))


def test_rendering_imports_neither_torch_nor_numpy():
    code = "import sys, ghostvis_model.chat; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2)), b"\x00", 0])
def test_any_object_can_be_an_image_reference(image):
    messages = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    assert render_for_completion(messages, NEW, 2).images[0] is image
    answered = render([*messages, {"role": "assistant", "content": "a"}], NEW, 2)
    assert answered.images[0] is image
