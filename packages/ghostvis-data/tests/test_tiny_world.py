"""The tiny world keeps its word: pure in its seed, honest splits, right answers, balanced answers."""

import json
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from ghostvis_data import tiny_world as tw

SCENES = {split: [tw.scene(split, i, seed=3) for i in range(600)] for split in ("train", "test", "combinations")}


def asked(scene: tw.Scene) -> list[tw.Question]:
    return tw.questions(scene, random.Random(scene.index))


def test_the_same_split_index_and_seed_give_the_same_scene_picture_and_conversation():
    for split in ("train", "test", "combinations"):
        a, b = tw.scene(split, 7, seed=1), tw.scene(split, 7, seed=1)
        assert a == b
        assert tw.draw(a).tobytes() == tw.draw(b).tobytes()
        assert tw.conversation(a) == tw.conversation(b)
        assert a != tw.scene(split, 7, seed=2)
    assert list(tw.text_documents(5, 3)) == list(tw.text_documents(5, 3))


def test_a_scene_is_pinned_so_that_a_changed_world_is_noticed():
    assert tw.caption(tw.scene("train", 0, seed=0)) == (
        "A blue cross at the top left, a blue square on the left, "
        "a red square on the right and a blue circle at the bottom."
    )


def test_one_combination_in_five_is_held_out_and_every_colour_and_shape_stays():
    assert len(tw.HELD_OUT) == 5
    seen = [(c, s) for c in tw.COLOURS for s in tw.SHAPES if (c, s) not in tw.HELD_OUT]
    assert {c for c, _ in seen} == set(tw.COLOURS)
    assert {s for _, s in seen} == set(tw.SHAPES)


def test_no_held_out_combination_in_training_pictures_or_training_text():
    texts = [json.dumps([tw.conversation(s), tw.caption_conversation(s)]) for s in SCENES["train"]]
    texts += [json.dumps(document) for document in tw.text_documents(3, 600)]
    for scene in SCENES["train"] + SCENES["test"]:
        assert not any(o.pair in tw.HELD_OUT for o in scene.objects)
    for colour, shape in tw.HELD_OUT:
        assert not any(f"{colour} {shape}" in text for text in texts)
    assert any("red circle" in text for text in texts)


def test_test_layouts_never_occur_in_training_under_any_seed():
    train = {tw.scene("train", i, seed).layout for seed in (-1, 0, 1, 2) for i in range(2000)}
    assert not train & {s.layout for s in SCENES["test"]}


def test_combination_scenes_show_a_held_out_object_and_ask_about_it():
    for scene in SCENES["combinations"]:
        held_out = [o for o in scene.objects if o.pair in tw.HELD_OUT]
        assert held_out
        for q in asked(scene):
            assert q.type in ("colour", "shape", "where")
            target = {"colour": lambda o: o.colour, "shape": lambda o: o.shape, "where": lambda o: tw.PLACES[o.cell]}
            assert any(q.answer.endswith(f" {target[q.type](o)}") for o in held_out)


@pytest.mark.parametrize("split", SCENES)
def test_answers_follow_from_the_scene(split):
    for scene in SCENES[split]:
        for q in asked(scene):
            assert q.answer == derive(scene, q.text), (scene, q)


def derive(scene: tw.Scene, text: str) -> str:
    """The answer from the words of the question alone, sharing no code with the generator."""

    def find(words: str) -> list[tw.Object]:
        wanted = set(words.split()) - {"the", "a", "object"}
        return [o for o in scene.objects if wanted <= {o.colour, o.shape}]

    def one(words: str) -> tw.Object:
        (found,) = find(words)
        return found

    if m := re.fullmatch(r"What colour is (.*)\?", text):
        return f"It is {one(m[1]).colour}"
    if m := re.fullmatch(r"What shape is (.*)\?", text):
        return f"A {one(m[1]).shape}"
    if m := re.fullmatch(r"Where is (.*)\?", text):
        row, column = divmod(one(m[1]).cell, 3)
        words = [w for w in (("top", "", "bottom")[row], ("left", "", "right")[column]) if w]
        return {(): "In the centre", ("left",): "On the left", ("right",): "On the right"}.get(
            tuple(words), f"At the {' '.join(words)}"
        )
    if text == "How many objects are there?":
        return ["zero", "one", "two", "three", "four"][len(scene.objects)]
    if m := re.fullmatch(r"How many (\w+?)(?:(?<=ss)es|s) are there\?", text):
        return ["zero", "one", "two", "three", "four"][len(find(m[1]))]
    if m := re.fullmatch(r"Is there (.*)\?", text):
        return "yes" if find(m[1]) else "no"
    m = re.fullmatch(r"Is (.*) (left of|right of|above|below) (.*)\?", text)
    assert m, text
    (row_a, column_a), (row_b, column_b) = divmod(one(m[1]).cell, 3), divmod(one(m[3]).cell, 3)
    holds = {"left of": column_a < column_b, "right of": column_a > column_b, "above": row_a < row_b}
    return "yes" if holds.get(m[2], row_a > row_b) else "no"


def test_no_answer_dominates_its_question_type():
    answers = defaultdict(Counter)
    for scene in SCENES["train"] + SCENES["test"]:
        for q in asked(scene):
            answers[q.type][q.answer] += 1
    assert set(answers) == set(tw.QUESTION_TYPES)
    bound = {
        "colour": 0.25,
        "shape": 0.35,
        "where": 0.2,
        "count": 0.35,
        "count_shape": 0.5,
        "exists": 0.57,
        "relation": 0.57,
    }
    for kind, counts in answers.items():
        share = max(counts.values()) / counts.total()
        assert share < bound[kind], (kind, counts)
        assert counts.total() > 500, kind


def test_colour_and_shape_are_never_asked_of_the_same_object():
    for scene in SCENES["train"]:
        text = {q.type: q for q in asked(scene)}
        if "colour" in text and "shape" in text:
            pair = (text["colour"].answer.split()[-1], text["shape"].answer.split()[-1])
            assert (
                text["colour"].text != f"What colour is the {pair[1]}?" or f"the {pair[0]} " not in text["shape"].text
            )


def test_objects_are_drawn_in_their_own_cells_in_their_colour():
    for scene in SCENES["train"][:100]:
        pixels = np.asarray(tw.draw(scene)).astype(int)
        assert pixels.shape == (48, 48, 3)
        changed = np.abs(pixels - np.array(scene.background)).sum(-1) > 60
        cells = changed.reshape(3, 16, 3, 16).any(axis=(1, 3)).reshape(-1)
        assert set(np.flatnonzero(cells)) == {o.cell for o in scene.objects}
        for o in scene.objects:
            assert np.abs(pixels[int(o.y_px), int(o.x_px)] - np.array(o.rgb)).max() <= 2


def test_cell_labels_name_what_is_in_each_cell():
    for scene in SCENES["train"][:100]:
        colours, shapes = tw.cell_labels(scene)
        for o in scene.objects:
            assert (["", *tw.COLOURS][colours[o.cell]], ["", *tw.SHAPES][shapes[o.cell]]) == o.pair
        assert (colours > 0).sum() == (shapes > 0).sum() == len(scene.objects)


def test_a_conversation_carries_its_picture_once_and_alternates():
    for scene in SCENES["train"][:50]:
        messages = tw.conversation(scene, image="a.png")
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert json.dumps(messages).count('"image": "a.png"') == 1
        texts = [m["content"] for m in messages[2::2]]
        assert len(set(texts)) == len(texts)
        assert messages[0]["content"][0] == {"type": "image", "image": "a.png"}


def test_a_wrong_split_is_refused_by_name():
    with pytest.raises(ValueError, match="no split named 'val'"):
        tw.scene("val", 0)
